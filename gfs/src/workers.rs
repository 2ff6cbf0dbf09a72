//! A pool of threads that grows with the work that waits in it and shrinks when idle.
//!
//! Jobs may block for as long as another node likes, so a fixed number of threads would be a deadlock once that many of them
//! wait for something that a later job would bring. The bound is therefore a resource limit only (`limits`).

use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

type Job = Box<dyn FnOnce() + Send>;

/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    threads: usize,
    closed: bool,
}

struct Shared {
    name: String,
    max: usize,
    queue: Mutex<Queue>,
    wake: Condvar,
    ended: Condvar,
}

/// Dropping the pool lets running jobs finish and waits for nothing.
pub struct Workers {
    shared: Arc<Shared>,
}

impl Workers {
    pub fn new(name: &str, max: usize) -> Self {
        Self {
            shared: Arc::new(Shared {
                name: name.to_owned(),
                max,
                queue: Mutex::default(),
                wake: Condvar::new(),
                ended: Condvar::new(),
            }),
        }
    }

    /// Runs the job soon, on its own thread if all others are busy.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut queue = self.shared.queue.lock();
        queue.jobs.push_back(Box::new(job));
        if queue.idle >= queue.jobs.len() {
            drop(queue);
            self.shared.wake.notify_one();
            return;
        }
        if queue.threads >= self.shared.max {
            return;
        }
        queue.threads += 1;
        drop(queue);
        let shared = Arc::clone(&self.shared);
        let spawned =
            std::thread::Builder::new().name(self.shared.name.clone()).spawn(move || Self::serve(&shared));
        if let Err(error) = spawned {
            let mut queue = self.shared.queue.lock();
            queue.threads -= 1;
            assert!(queue.threads > 0, "cannot start a single {} thread: {error}", self.shared.name);
            tracing::error!(%error, pool = %self.shared.name, threads = queue.threads, "cannot start a thread; work will wait");
        }
    }

    fn serve(shared: &Shared) {
        let mut queue = shared.queue.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                job();
                queue = shared.queue.lock();
                continue;
            }
            if queue.closed {
                break;
            }
            queue.idle += 1;
            let timed_out = shared.wake.wait_for(&mut queue, IDLE).timed_out();
            queue.idle -= 1;
            if timed_out && queue.jobs.is_empty() {
                break;
            }
        }
        queue.threads -= 1;
        shared.ended.notify_all();
    }

    /// Takes no thread away from running jobs; true when all have ended within `limit`.
    pub fn drain(&self, limit: Duration) -> bool {
        let mut queue = self.shared.queue.lock();
        queue.closed = true;
        self.shared.wake.notify_all();
        let deadline = std::time::Instant::now() + limit;
        while queue.threads > 0 {
            if self.shared.ended.wait_until(&mut queue, deadline).timed_out() {
                return queue.threads == 0;
            }
        }
        true
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.queue.lock().closed = true;
        self.shared.wake.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn jobs_that_wait_for_each_other_all_run() {
        let pool = Workers::new("test", 64);
        let barrier = Arc::new(Barrier::new(33));
        for _ in 0..32 {
            let barrier = Arc::clone(&barrier);
            pool.run(move || {
                barrier.wait();
            });
        }
        barrier.wait();
        assert!(pool.drain(Duration::from_secs(5)));
    }
}
