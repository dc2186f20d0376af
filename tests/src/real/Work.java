import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.util.ArrayDeque;
import java.util.concurrent.atomic.AtomicLongArray;

/** Threads that fill a heap and forget it again, and check what they still have; counted in a file. */
public class Work {
    static final int THREADS = 24;
    static final AtomicLongArray turns = new AtomicLongArray(THREADS);
    static volatile String wrong = "";
    static volatile boolean stop = false;

    static void work(int number) {
        ArrayDeque<long[]> kept = new ArrayDeque<>();
        long turn = 0;
        while (!stop) {
            long[] block = new long[4096];
            for (int at = 0; at < block.length; at++) {
                block[at] = turn * 4096 + at + number;
            }
            kept.addLast(block);
            // It grows to three MiB for each thread, and what is older is garbage.
            if (kept.size() > 96) {
                long[] old = kept.removeFirst();
                for (int at = 1; at < old.length; at++) {
                    if (old[at] != old[0] + at) {
                        wrong = "thread " + number + ", turn " + turn + ", number " + at;
                    }
                }
            }
            turn++;
            if (turn % 50 == 0) {
                turns.set(number, turn / 50);
            }
        }
    }

    public static void main(String[] args) throws IOException, InterruptedException {
        Thread[] threads = new Thread[THREADS];
        for (int number = 0; number < THREADS; number++) {
            int own = number;
            threads[number] = new Thread(() -> work(own));
            threads[number].start();
        }
        while (!Files.exists(Path.of("stop"))) {
            StringBuilder text = new StringBuilder(wrong);
            for (int number = 0; number < THREADS; number++) {
                text.append(turns.get(number)).append(' ');
            }
            Files.writeString(Path.of("counts.new"), text);
            Files.move(Path.of("counts.new"), Path.of("counts"), StandardCopyOption.ATOMIC_MOVE);
            Thread.sleep(10);
        }
        stop = true;
        for (Thread thread : threads) {
            thread.join();
        }
        System.exit(wrong.isEmpty() ? 0 : 1);
    }
}
