//! Work that requests need before they can be queued: parsing, tokenizing, compiling grammars.

use axum::http::StatusCode;

use super::error::ApiError;

/// How far preparing stands back, in steps of niceness: beside threads that always have something
/// to do it still gets about a tenth of a core.
#[cfg(target_os = "linux")]
const NICENESS: i32 = 10;

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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use rustix::process::getpriority_process;

    use super::*;

    #[test]
    fn preparing_stands_back_and_nothing_else_does() {
        let before = getpriority_process(None).unwrap();
        let runtime = crate::runtime().unwrap();
        let own = prepared(|| Ok(getpriority_process(None).unwrap()));
        assert!(runtime.block_on(own).is_ok_and(|niceness| niceness >= NICENESS));
        let others = runtime.spawn(async { getpriority_process(None).unwrap() });
        assert_eq!(runtime.block_on(others).unwrap(), before);
        assert_eq!(getpriority_process(None).unwrap(), before);
    }
}
