//! Work that requests need before they can be queued: parsing, tokenizing, compiling grammars.

use std::time::{Duration, Instant};

use axum::http::StatusCode;

use super::error::ApiError;

/// How far preparing stands back, in steps of niceness: beside threads that always have something
/// to do it still gets about a tenth of a core.
#[cfg(target_os = "linux")]
const NICENESS: i32 = 10;

/// Longest work between two pauses of work that can pause, and how long a pause is.
const STRETCH: Duration = Duration::from_micros(200);
const PAUSE: Duration = Duration::from_millis(1);

/// Does `work` on a thread that stands back for those of the engine, so that streams don't stall
/// while a long prompt becomes tokens.
pub(super) async fn prepared<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let task = tokio::task::spawn_blocking(move || {
        stand_back();
        work()
    });
    task.await.map_err(|error| {
        tracing::error!(%error, "a request could not be prepared");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "the request could not be prepared")
    })?
}

/// What long work calls again and again: leaves the core to others for a moment when it is time
/// to, while requests run.
///
/// Where every core computes, low priority is not enough: threads of a pool that look for work
/// give way again and again, and after that one which prepares may run for tens of milliseconds
/// before they go on (seen with Linux 6.18).
pub(super) fn pauses(requests_run: impl Fn() -> bool) -> impl FnMut() {
    let mut last = Instant::now();
    move || {
        if is_due(last.elapsed(), &requests_run) {
            std::thread::sleep(PAUSE);
            last = Instant::now();
        }
    }
}

/// Whether work that has gone on for so long has to pause.
fn is_due(worked: Duration, requests_run: impl Fn() -> bool) -> bool {
    worked >= STRETCH && requests_run()
}

/// Lowers the priority of the current thread, for good: it does nothing but prepare.
#[cfg(target_os = "linux")]
fn stand_back() {
    // The system takes the current thread, not the process. If it refuses, streams stall a little.
    if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
        tracing::debug!(%error, "requests are prepared with usual priority");
    }
}

/// Elsewhere a thread's priority is not its own.
#[cfg(not(target_os = "linux"))]
fn stand_back() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_work_pauses_while_requests_run() {
        assert!(!is_due(STRETCH, || false), "nobody waits");
        assert!(is_due(STRETCH, || true));
        assert!(!is_due(STRETCH / 2, || true));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn preparing_stands_back_and_nothing_else_does() {
        use rustix::process::getpriority_process;

        let before = getpriority_process(None).unwrap();
        let runtime = crate::runtime().unwrap();
        let own = prepared(|| Ok(getpriority_process(None).unwrap()));
        assert!(runtime.block_on(own).is_ok_and(|niceness| niceness >= NICENESS));
        let others = runtime.spawn(async { getpriority_process(None).unwrap() });
        assert_eq!(runtime.block_on(others).unwrap(), before);
        assert_eq!(getpriority_process(None).unwrap(), before);
    }
}
