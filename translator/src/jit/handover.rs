//! The way of jobs to the compile threads, and of what becomes of them back: all that a vCPU and the workers share.
//!
//! The vCPU's thread never waits here. A full queue refuses a job; results are taken when [`Handover::has_done`] says
//! that there are some, in the order in which they were ready, which with several workers is not that of the jobs.
//! Whether a result is still wanted when it arrives is for the cache to say ([`super::cache`]).

use std::collections::VecDeque;

use crate::sync::{AtomicBool, Condvar, Mutex, Ordering};

/// Jobs `J` on their way to the workers, and results `D` on their way back.
pub struct Handover<J, D> {
    queue: Mutex<Queue<J>>,
    /// A job was queued, or the queue closed.
    work: Condvar,
    done: Mutex<Vec<D>>,
    /// A result was added.
    ready: Condvar,
    /// Whether there are results. It changes under their lock, and is what the vCPU looks at between two blocks.
    any_done: AtomicBool,
}

struct Queue<J> {
    jobs: VecDeque<J>,
    /// Jobs that may wait.
    room: usize,
    closed: bool,
}

impl<J, D> Handover<J, D> {
    /// A way on which `room` jobs may wait for a worker.
    pub fn new(room: usize) -> Handover<J, D> {
        Handover {
            queue: Mutex::new(Queue { jobs: VecDeque::new(), room, closed: false }),
            work: Condvar::new(),
            done: Mutex::new(Vec::new()),
            ready: Condvar::new(),
            any_done: AtomicBool::new(false),
        }
    }

    /// Queues a job; false if the queue is full.
    #[must_use]
    pub fn request(&self, job: J) -> bool {
        let mut queue = self.queue.lock();
        if queue.jobs.len() >= queue.room {
            return false;
        }
        queue.jobs.push_back(job);
        self.work.notify_one();
        true
    }

    /// Whether results wait to be taken.
    #[inline(always)]
    pub fn has_done(&self) -> bool {
        self.any_done.load(Ordering::Relaxed)
    }

    /// Waits until `count` results can be taken, or more.
    pub fn wait_for(&self, count: usize) {
        let mut done = self.done.lock();
        while done.len() < count {
            self.ready.wait(&mut done);
        }
    }

    /// Takes the results.
    pub fn take_done(&self) -> Vec<D> {
        let mut done = self.done.lock();
        self.any_done.store(false, Ordering::Relaxed);
        std::mem::take(&mut *done)
    }

    /// A worker's life: does jobs until the way is closed.
    pub fn serve(&self, mut work: impl FnMut(J) -> D) {
        while let Some(job) = self.next_job() {
            let result = work(job);
            let mut done = self.done.lock();
            done.push(result);
            self.any_done.store(true, Ordering::Relaxed);
            self.ready.notify_all();
        }
    }

    /// Waits for a job; `None` once the way is closed.
    fn next_job(&self) -> Option<J> {
        let mut queue = self.queue.lock();
        loop {
            if queue.closed {
                return None;
            }
            match queue.jobs.pop_front() {
                Some(job) => return Some(job),
                None => self.work.wait(&mut queue),
            }
        }
    }

    /// Ends every worker after the job that it is at.
    pub fn close(&self) {
        self.queue.lock().closed = true;
        self.work.notify_all();
    }
}
