//! What the datapath itself says of rare things, in the daemon's log: only with the feature
//! `datapath-log`, which puts the code for it into the object.

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
};
use tracing_log::LogTracer;

use super::DatapathError;

/// Reads on as long as the event loop of the calling thread runs; nothing where there is none, as in a
/// test of the maps alone.
pub(super) fn follow(ebpf: &mut Ebpf) -> Result<(), DatapathError> {
    let Ok(runtime) = Handle::try_current() else {
        return Ok(());
    };
    let failed = |error: &dyn ToString| DatapathError::Object(error.to_string());
    let logger =
        EbpfLogger::init_with_logger(ebpf, LogTracer::new()).map_err(|error| failed(&error))?;
    // SAFETY: the map's descriptor is open as long as the logger, which owns it and never exchanges it.
    let logger = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
    let mut logger = logger.map_err(|error| failed(&error))?;
    runtime.spawn(async move {
        loop {
            // The kernel wakes a reader only when the buffer was empty to it: read before waiting.
            logger.get_mut().flush();
            match logger.readable_mut().await {
                Ok(mut ready) => ready.clear_ready(),
                // The event loop ends, and this with it.
                Err(_) => return,
            }
        }
    });
    Ok(())
}
