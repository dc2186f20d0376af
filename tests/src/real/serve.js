// An HTTP server on loopback that tells what its intervals and its worker threads have counted.

const http = require("http");
const { Worker, isMainThread, parentPort } = require("worker_threads");

if (!isMainThread) {
  // Fills an array, sorts it, sees that it is sorted, and says so.
  let seed = 1;
  const next = () => (seed = (seed * 48271) % 2147483647);
  const turn = () => {
    const numbers = Array.from({ length: 2000 }, next).sort((a, b) => a - b);
    parentPort.postMessage(numbers.every((value, at) => at === 0 || numbers[at - 1] <= value));
    setTimeout(turn, 1);
  };
  turn();
} else {
  const counts = { quick: 0, slow: 0, first: 0, second: 0 };
  let wrong = false;
  setInterval(() => counts.quick++, 2);
  setInterval(() => counts.slow++, 7);
  for (const name of ["first", "second"]) {
    new Worker(__filename).on("message", (good) => {
      counts[name]++;
      wrong = wrong || !good;
    });
  }
  http
    .createServer((request, response) => {
      response.setHeader("Connection", "close");
      response.end(wrong ? "wrong" : Object.values(counts).join(" "));
      if (request.url === "/stop") response.on("finish", () => process.exit(wrong ? 1 : 0));
    })
    .listen(8080, "127.0.0.1");
}
