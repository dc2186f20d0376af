//! The agent's machine code, and the executable that a puppet is.
//!
//! Registers of the agent: r14 its slot, r15 the start of the list, r12 the operation, r13 the end. It
//! has no stack; rsp is not touched until the way back. A system call changes rax, rcx and r11 alone.

use crate::list::{JUDGE_ANY, JUDGE_EQUAL, JUDGE_SPAWN, OP_SIZE, SCAN, slot};
use crate::puppet::CloneArgs;
use std::arch::{asm, global_asm};

/// Where the code begins in the page of a puppet, behind the ELF header and the configuration.
const CODE_AT: usize = 0x100;
/// Where the configuration of a puppet is in its page.
pub const CONFIG_AT: usize = 0x80;
const PAGE: usize = 4096;

global_asm!(
    ".pushsection .rodata.crtools_agent, \"a\"",
    ".balign 16",
    ".globl crtools_agent_begin, crtools_agent_enter, crtools_agent_run, crtools_agent_end",
    ".hidden crtools_agent_begin, crtools_agent_enter, crtools_agent_run, crtools_agent_end",
    "crtools_agent_begin:",
    // How a puppet starts: its page is mapped from an executable file, which has to go before
    // /proc/PID/exe can become another. Map the shared area, copy the page, go on in the copy.
    "crtools_agent_enter:",
    "lea rbx, [rip + crtools_agent_begin]",
    "mov rdi, [rbx - {config}]",
    "mov rsi, [rbx - {config} + 8]",
    "mov edx, 3",
    "mov r10d, 0x100001", // MAP_SHARED | MAP_FIXED_NOREPLACE
    "mov r8, [rbx - {config} + 16]",
    "xor r9d, r9d",
    "mov eax, 9", // mmap
    "syscall",
    "cmp rax, rdi",
    "jne 9f",
    "mov rdi, [rbx - {config} + 24]",
    "mov esi, 4096",
    "mov edx, 3",
    "mov r10d, 0x100022", // MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    "mov r8, -1",
    "xor r9d, r9d",
    "mov eax, 9",
    "syscall",
    "cmp rax, rdi",
    "jne 9f",
    "lea rsi, [rbx - {code_at}]",
    "mov ecx, 512",
    "rep movsq",
    "mov rdi, [rbx - {config} + 24]",
    "mov esi, 4096",
    "mov edx, 5", // PROT_READ | PROT_EXEC
    "mov eax, 10", // mprotect
    "syscall",
    "test rax, rax",
    "jnz 9f",
    "mov r14, [rbx - {config} + 32]",
    "lea rax, [rip + crtools_agent_run]",
    "sub rax, rbx",
    "lea rax, [rdi + rax + {code_at}]",
    "xor esp, esp",
    "jmp rax",
    // Wait for our turn. Any third value means that the coordinator is gone: the kernel marked the word.
    "crtools_agent_run:",
    "mov ecx, [r14 + {idle}]",
    "and ecx, 0x7fffffff",
    "mov eax, [r14 + {turn}]",
    "cmp eax, ecx",
    "je 3f",
    "cmp eax, [r14 + {idle}]",
    "jne 8f",
    "mov edx, eax",
    "lea rdi, [r14 + {turn}]",
    "xor esi, esi", // FUTEX_WAIT
    "xor r10d, r10d",
    "mov eax, 202",
    "syscall",
    "jmp crtools_agent_run",
    // Execute the list.
    "3:",
    "mov r15, [r14 + {list}]",
    "mov r13, [r14 + {end}]",
    "mov r12, r15",
    "4:",
    "cmp r12, r13",
    "jae 6f",
    "movzx ebp, byte ptr [r12 + 5]",
    "mov rdi, [r12 + 8]",
    "test bpl, 1",
    "jz 2f",
    "mov rdi, [r15 + rdi]",
    "2:",
    "mov rsi, [r12 + 16]",
    "test bpl, 2",
    "jz 2f",
    "mov rsi, [r15 + rsi]",
    "2:",
    "mov rdx, [r12 + 24]",
    "test bpl, 4",
    "jz 2f",
    "mov rdx, [r15 + rdx]",
    "2:",
    "mov r10, [r12 + 32]",
    "test bpl, 8",
    "jz 2f",
    "mov r10, [r15 + r10]",
    "2:",
    "mov r8, [r12 + 40]",
    "test bpl, 16",
    "jz 2f",
    "mov r8, [r15 + r8]",
    "2:",
    "mov r9, [r12 + 48]",
    "test bpl, 32",
    "jz 2f",
    "mov r9, [r15 + r9]",
    "2:",
    "mov eax, [r12]",
    "cmp eax, {scan}",
    "je 22f",
    "syscall",
    // Judge the result.
    "21:",
    "movzx ebp, byte ptr [r12 + 4]",
    "cmp bpl, {spawn}",
    "jne 2f",
    "test rax, rax",
    "jnz 2f",
    "mov r14, [r12 + 56]", // we are the child, with a slot of our own
    "jmp crtools_agent_run",
    "2:",
    "mov [r12 + 64], rax",
    "cmp bpl, {any}",
    "je 5f",
    "cmp rax, -4", // EINTR
    "je 4b",
    "cmp bpl, {equal}",
    "je 2f",
    "test rax, rax",
    "jns 5f",
    "cmp bpl, {spawn}",
    "je 7f",
    "2:",
    "cmp rax, [r12 + 56]",
    "jne 7f",
    "5:",
    "add r12, {op_size}",
    "jmp 4b",
    // Hand over: done, or stopped at r12.
    "6:",
    "xor r12d, r12d",
    "7:",
    "mov [r14 + {stopped}], r12",
    "mov ecx, [r14 + {idle}]",
    "mov eax, ecx",
    "and eax, 0x7fffffff",
    "lock cmpxchg [r14 + {turn}], ecx",
    "jne 8f",
    "lea rdi, [r14 + {turn}]",
    "mov esi, 1", // FUTEX_WAKE
    "mov edx, 0x7fffffff",
    "mov eax, 202",
    "syscall",
    "jmp crtools_agent_run",
    // Nobody is there any more: back to the thread's own life, or, without one, the end.
    "8:",
    "mov rsp, [r14 + {frame}]",
    "test rsp, rsp",
    "jz 9f",
    "mov eax, 15", // rt_sigreturn
    "syscall",
    "9:",
    "mov edi, 1",
    "mov eax, 231", // exit_group
    "syscall",
    "ud2",
    // No call: which pages hold something? rdi is where they begin, rsi where they end, rdx has a byte for each.
    "22:",
    "xor eax, eax",
    "cmp rdi, rsi",
    "jae 21b",
    "lea r10, [rdi + 4096]",
    "23:",
    "mov rax, [rdi]",
    "or rax, [rdi + 8]",
    "or rax, [rdi + 16]",
    "or rax, [rdi + 24]",
    "or rax, [rdi + 32]",
    "or rax, [rdi + 40]",
    "or rax, [rdi + 48]",
    "or rax, [rdi + 56]",
    "jnz 24f",
    "add rdi, 64",
    "cmp rdi, r10",
    "jb 23b",
    "24:",
    "setnz byte ptr [rdx]",
    "inc rdx",
    "mov rdi, r10",
    "jmp 22b",
    "crtools_agent_end:",
    ".popsection",
    config = const (CODE_AT - CONFIG_AT),
    code_at = const CODE_AT,
    turn = const slot::TURN,
    idle = const slot::IDLE,
    list = const slot::LIST,
    end = const slot::END,
    stopped = const slot::STOPPED,
    frame = const slot::FRAME,
    any = const JUDGE_ANY,
    equal = const JUDGE_EQUAL,
    spawn = const JUDGE_SPAWN,
    scan = const SCAN,
    op_size = const OP_SIZE,
);

unsafe extern "C" {
    static crtools_agent_begin: u8;
    static crtools_agent_enter: u8;
    static crtools_agent_run: u8;
    static crtools_agent_end: u8;
}

/// The agent's code; it runs at any address.
pub fn code() -> &'static [u8] {
    let (begin, end) = (&raw const crtools_agent_begin, &raw const crtools_agent_end);
    // SAFETY: the assembler put both labels around one run of read-only bytes of this program.
    unsafe { std::slice::from_raw_parts(begin, end as usize - begin as usize) }
}

/// Offset in [`code`] at which the agent waits for a list, with r14 pointing to its slot.
pub fn run_at() -> u64 {
    (&raw const crtools_agent_run) as u64 - (&raw const crtools_agent_begin) as u64
}

/// Offset in [`code`] at which a puppet starts.
pub fn enter_at() -> u64 {
    (&raw const crtools_agent_enter) as u64 - (&raw const crtools_agent_begin) as u64
}

/// What a puppet has to know when it starts.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Where the shared area goes, its length in bytes, and the descriptor it is mapped from.
    pub area: u64,
    pub area_len: u64,
    pub area_fd: i32,
    /// Where the copy of the code goes: one page.
    pub code: u64,
    /// Where the executable is mapped: one page, which the first list unmaps.
    pub image: u64,
    /// Address of the first slot.
    pub slot: u64,
}

/// A static executable of one page that holds nothing but the agent.
pub fn puppet_elf(config: &Config) -> Vec<u8> {
    let mut page = Vec::with_capacity(PAGE);
    let mut put = |bytes: &[u8]| page.extend_from_slice(bytes);
    // Elf64_Ehdr: an executable for x86-64 with one program header behind this one.
    put(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    put(&2u16.to_le_bytes());
    put(&62u16.to_le_bytes());
    put(&1u32.to_le_bytes());
    put(&(config.image + CODE_AT as u64 + enter_at()).to_le_bytes());
    put(&64u64.to_le_bytes());
    put(&0u64.to_le_bytes());
    put(&0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        put(&half.to_le_bytes());
    }
    // Elf64_Phdr: PT_LOAD, readable and executable, the whole page.
    put(&1u32.to_le_bytes());
    put(&5u32.to_le_bytes());
    for word in [0, config.image, config.image, PAGE as u64, PAGE as u64, PAGE as u64] {
        put(&word.to_le_bytes());
    }
    page.resize(CONFIG_AT, 0);
    for word in [config.area, config.area_len, config.area_fd as u64, config.code, config.slot] {
        page.extend_from_slice(&word.to_le_bytes());
    }
    page.resize(CODE_AT, 0);
    page.extend_from_slice(code());
    assert!(page.len() <= PAGE);
    page.resize(PAGE, 0);
    page
}

/// clone3(2), and in the child execveat(2) of `file`; a failure of that is left in `failed`.
///
/// # Safety
/// `args` must ask for a child that shares memory (CLONE_VM) and suspends us (CLONE_VFORK), and name no
/// memory that the child or the kernel may not use.
pub unsafe fn clone_and_exec(args: &CloneArgs, file: i32, none: &[u64; 1], failed: &mut i64) -> i64 {
    let result: i64;
    // SAFETY: the caller vouches for `args`. The child stays in this block: it uses no stack, writes `failed`
    // alone, and ends. What it does to registers is its own.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov rdi, {file}",
            "mov rsi, {none}", // an empty path
            "mov rdx, {none}", // no arguments
            "mov r10, {none}", // no environment
            "mov r8d, 0x1000", // AT_EMPTY_PATH
            "mov eax, 322", // execveat
            "syscall",
            "mov [{failed}], rax",
            "mov edi, 1",
            "mov eax, 60", // exit
            "syscall",
            "2:",
            file = in(reg) i64::from(file),
            none = in(reg) none.as_ptr(),
            failed = in(reg) failed,
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") args,
            in("rsi") CloneArgs::SIZE,
            out("rcx") _,
            out("r11") _,
        );
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_fits_a_page_with_its_headers() {
        assert!(CODE_AT + code().len() < 1024, "{} bytes", code().len());
    }

    #[test]
    fn the_code_holds_no_address_of_this_program() {
        let here = (&raw const crtools_agent_begin) as u64 >> 12;
        for window in code().windows(8) {
            let word = u64::from_le_bytes(window.try_into().unwrap());
            assert_ne!(word >> 12, here);
        }
    }
}
