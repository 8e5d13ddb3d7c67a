//! The compiled datapath, and how it gets into the kernel.

use std::path::Path;

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::MapError,
    programs::{Program, ProgramError, SchedClassifier, Xdp},
};
use nix::libc;

use super::{AttachMode, DatapathError, names};
use crate::{next_hop::LinkLayer, privileges::is_kernel_before};

/// The compiled datapath. All entry points are in it.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/relay"));

/// The first Linux whose XDP programs can copy packets.
pub(super) const LOAD_BYTES_SINCE: (u32, u32) = (5, 18);

/// Loads the object with its maps sized for `max_streams`, for any hook.
///
/// # Errors
/// [`DatapathError::Refused`] and the like, with the kernel's reason.
pub fn load(mode: AttachMode, layer: LinkLayer, max_streams: u32) -> Result<Ebpf, DatapathError> {
    load_onto(mode, layer, max_streams, None)
}

/// As [`load`], onto the maps pinned in a directory, which must all be there and of these layouts:
/// aya takes whatever it finds.
pub(super) fn load_onto(
    mode: AttachMode,
    layer: LinkLayer,
    max_streams: u32,
    pins: Option<&Path>,
) -> Result<Ebpf, DatapathError> {
    let generic = u8::from(mode == AttachMode::Generic);
    let ethernet = u8::from(layer != LinkLayer::Ip);
    let load_bytes = u8::from(!is_kernel_before(LOAD_BYTES_SINCE));
    let mut loader = EbpfLoader::new();
    loader.override_global(names::GENERIC, &generic, true);
    loader.override_global(names::LOAD_BYTES, &load_bytes, true);
    loader.override_global(names::ETHERNET, &ethernet, true);
    for name in names::SIZED {
        loader.map_max_entries(name, max_streams);
    }
    for name in names::MAPS {
        if let Some(pins) = pins {
            loader.map_pin_path(name, pins.join(name));
        }
    }
    create(&mut loader, OBJECT, "lower `--max-streams`")
}

/// Loads an object with its maps. `memory` is the remedy where there is too little.
pub(crate) fn create(
    loader: &mut EbpfLoader<'_>,
    object: &[u8],
    memory: &'static str,
) -> Result<Ebpf, DatapathError> {
    loader.load(object).map_err(|error| match error {
        EbpfError::MapError(MapError::CreateError { io_error, .. }) => {
            let remedy = match io_error.raw_os_error() {
                Some(libc::ENOMEM) => memory,
                Some(libc::EPERM) => "CAP_BPF is needed",
                _ => "Linux 5.15 or newer is needed",
            };
            DatapathError::Refused {
                what: "the maps",
                remedy,
                source: io_error,
            }
        }
        error => DatapathError::Load(Box::new(error)),
    })
}

/// The XDP program of a loaded object, itself loaded.
///
/// # Errors
/// [`DatapathError::Verifier`] with the kernel's log, [`DatapathError::Refused`] for want of a
/// capability.
pub fn load_xdp(ebpf: &mut Ebpf) -> Result<&mut Xdp, DatapathError> {
    let program: &mut Xdp = program(ebpf, names::XDP)?;
    program.load().map_err(load_error)?;
    Ok(program)
}

/// The TC program of a loaded object, itself loaded.
///
/// # Errors
/// As [`load_xdp`].
pub fn load_tc(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, DatapathError> {
    load_classifier(ebpf, names::TC)
}

/// The observer of a loaded object, itself loaded.
///
/// # Errors
/// As [`load_xdp`].
pub fn load_observer(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, DatapathError> {
    load_classifier(ebpf, names::OBSERVE)
}

/// A program for traffic control of a loaded object, itself loaded.
///
/// # Errors
/// As [`load_xdp`].
pub(crate) fn load_classifier<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, DatapathError> {
    let program: &mut SchedClassifier = program(ebpf, name)?;
    program.load().map_err(load_error)?;
    Ok(program)
}

/// The relay's program of a mode, itself loaded.
pub(super) fn load_relay(ebpf: &mut Ebpf, mode: AttachMode) -> Result<(), DatapathError> {
    match mode {
        AttachMode::Native | AttachMode::Generic => load_xdp(ebpf).map(drop),
        AttachMode::Tc => load_tc(ebpf).map(drop),
    }
}

/// The relay's program of a mode.
pub(super) fn relay(ebpf: &mut Ebpf, mode: AttachMode) -> Result<&mut Program, DatapathError> {
    untyped(
        ebpf,
        match mode {
            AttachMode::Native | AttachMode::Generic => names::XDP,
            AttachMode::Tc => names::TC,
        },
    )
}

/// A program of the object, typed.
pub(crate) fn program<'a, T>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut T, DatapathError>
where
    &'a mut T: TryFrom<&'a mut Program, Error = ProgramError>,
{
    untyped(ebpf, name)?
        .try_into()
        .map_err(|error: ProgramError| DatapathError::Object(error.to_string()))
}

fn untyped<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Program, DatapathError> {
    ebpf.program_mut(name)
        .ok_or_else(|| DatapathError::Object(format!("no program {name}")))
}

fn load_error(error: ProgramError) -> DatapathError {
    match error {
        ProgramError::LoadError { io_error, .. }
            if io_error.raw_os_error() == Some(libc::EPERM) =>
        {
            DatapathError::Refused {
                what: "the program",
                remedy: "CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN are needed",
                source: io_error,
            }
        }
        ProgramError::LoadError { verifier_log, .. } => {
            DatapathError::Verifier(verifier_log.to_string())
        }
        error => DatapathError::Object(error.to_string()),
    }
}
