//! Scheduling of the few threads whose lateness looks like death to the other nodes.

/// Priority within SCHED_RR (1…99): above every ordinary program, below the kernel's own threads.
const PRIORITY: i32 = 10;

/// Lets the calling thread run before all ordinary ones, as cman's and corosync's daemons do. Threads and programs that it starts are
/// ordinary again. Without the right to do so (CAP_SYS_NICE or RLIMIT_RTPRIO) it stays as it is: the cluster is as correct, but a busy machine
/// may be taken for a dead one. The kernel keeps a share of each core for ordinary programs (sched_rt_runtime_us), so that even a
/// loop without end does not freeze the machine.
#[allow(unsafe_code)]
pub fn this_thread() {
    let param = libc::sched_param { sched_priority: PRIORITY };
    // SAFETY: a plain system call; 0 is the calling thread, `param` lives through the call.
    let rc =
        unsafe { libc::sched_setscheduler(0, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, &raw const param) };
    if rc != 0 {
        let err = std::io::Error::last_os_error();
        tracing::debug!(err = %err, "no real-time priority");
    }
}
