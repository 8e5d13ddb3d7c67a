//! BPF links, which hold a program at its hook also when no process lives that knows of it, and
//! what else the BPF file system names.
//!
//! By system calls, because aya tells neither which interface a link is on nor detaches a link that
//! is pinned, and where the kernel refuses a link it attaches XDP in a manner that no pin can hold.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
};

use aya::maps::MapInfo;
use aya_obj::generated::{
    BPF_F_AFTER, BPF_F_BEFORE, BPF_F_RDONLY, XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE,
    bpf_attach_type, bpf_cmd, bpf_link_type,
};
use nix::libc;

use super::{
    names,
    tc::{Direction, Order},
};

/// A program at a hook of an interface, for as long as someone holds or has pinned the link.
pub(crate) struct Link(OwnedFd);

/// Where a link's program sits, in the order in which programs are detached: nothing may be relayed
/// unobserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Hook {
    /// XDP, in whatever mode.
    Xdp,
    /// TCX, before the stack.
    TcxIngress,
    /// TCX, before the queueing discipline.
    TcxEgress,
}

/// What the kernel says of a link.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LinkInfo {
    /// Number of the link.
    pub(crate) id: u32,
    /// Number of its program.
    pub(crate) program: u32,
    /// Where it sits; none of ours otherwise.
    pub(crate) hook: Option<Hook>,
    /// Index of its interface; 0 once that is gone.
    pub(crate) interface: u32,
}

impl Link {
    /// Attaches a program to XDP, in the driver or else in the stack.
    pub(crate) fn xdp(program: BorrowedFd<'_>, index: u32, native: bool) -> io::Result<Self> {
        let flags = if native {
            XDP_FLAGS_DRV_MODE
        } else {
            XDP_FLAGS_SKB_MODE
        };
        Self::create(program, index, bpf_attach_type::BPF_XDP, flags)
    }

    /// Attaches a program to traffic control.
    pub(crate) fn tcx(
        program: BorrowedFd<'_>,
        index: u32,
        direction: Direction,
        order: Order,
    ) -> io::Result<Self> {
        // Before or after nothing named: before or after all.
        let flags = match order {
            Order::First => BPF_F_BEFORE,
            Order::Last => BPF_F_AFTER,
        };
        Self::create(program, index, attach_type(direction), flags)
    }

    /// Numbers of the TCX links of an interface; none before Linux 6.6.
    pub(super) fn tcx_links(index: u32, direction: Direction) -> io::Result<Vec<u32>> {
        let programs = Self::tcx_programs(index, direction)?.unwrap_or_default();
        Ok(programs.into_iter().filter_map(|(_, link)| link).collect())
    }

    /// The TCX programs of an interface, each with its link, if a link holds it. `None` before Linux
    /// 6.6, which has no TCX.
    #[expect(
        clippy::type_complexity,
        reason = "two numbers that the kernel gives side by side"
    )]
    pub(crate) fn tcx_programs(
        index: u32,
        direction: Direction,
    ) -> io::Result<Option<Vec<(u32, Option<u32>)>>> {
        /// `struct { … } query` of `union bpf_attr`.
        #[repr(C)]
        struct Query {
            target: u32,
            attach_type: u32,
            flags: u32,
            attach_flags: u32,
            programs: u64,
            count: u32,
            padding: u32,
            program_flags: u64,
            links: u64,
            link_flags: u64,
            revision: u64,
        }
        // BPF_MPROG_MAX of include/linux/bpf_mprog.h, twice: those of another program have number 0.
        let (mut programs, mut links) = ([0_u32; 64], [0_u32; 64]);
        let mut query = Query {
            target: index,
            attach_type: attach_type(direction) as u32,
            flags: 0,
            attach_flags: 0,
            programs: programs.as_mut_ptr().addr() as u64,
            count: programs.len() as u32,
            padding: 0,
            program_flags: 0,
            links: links.as_mut_ptr().addr() as u64,
            link_flags: 0,
            revision: 0,
        };
        match bpf(bpf_cmd::BPF_PROG_QUERY, &mut query) {
            Ok(_) => Ok(Some(
                programs
                    .into_iter()
                    .zip(links)
                    .filter(|(program, _)| *program != 0)
                    .map(|(program, link)| (program, (link != 0).then_some(link)))
                    .collect(),
            )),
            Err(error) => match error.raw_os_error() {
                // No program at that hook; no such interface.
                Some(libc::ENOENT | libc::ENODEV) => Ok(Some(Vec::new())),
                // No TCX.
                Some(libc::EINVAL) => Ok(None),
                _ => Err(error),
            },
        }
    }

    fn create(
        program: BorrowedFd<'_>,
        target: u32,
        hook: bpf_attach_type,
        flags: u32,
    ) -> io::Result<Self> {
        /// `struct { … } link_create` of `union bpf_attr`.
        #[repr(C)]
        struct Create {
            program: i32,
            target: u32,
            hook: u32,
            flags: u32,
        }
        let mut create = Create {
            program: program.as_raw_fd(),
            target,
            hook: hook as u32,
            flags,
        };
        bpf_descriptor(bpf_cmd::BPF_LINK_CREATE, &mut create).map(Self)
    }

    /// What the kernel says of all links there are. Needs CAP_SYS_ADMIN.
    pub(crate) fn all() -> io::Result<Vec<LinkInfo>> {
        /// `struct { … }` of `BPF_*_GET_*_ID` of `union bpf_attr`.
        #[repr(C)]
        struct Id {
            id: u32,
            next: u32,
            flags: u32,
        }
        let mut found = Vec::new();
        let mut last = 0;
        loop {
            let mut next = Id {
                id: last,
                next: 0,
                flags: 0,
            };
            match bpf(bpf_cmd::BPF_LINK_GET_NEXT_ID, &mut next) {
                Ok(_) => last = next.next,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(found),
                Err(error) => return Err(error),
            }
            let mut open = Id {
                id: last,
                next: 0,
                flags: 0,
            };
            // One that goes meanwhile is none.
            if let Ok(link) = bpf_descriptor(bpf_cmd::BPF_LINK_GET_FD_BY_ID, &mut open) {
                found.push(Self(link).info()?);
            }
        }
    }

    /// Replaces the program: a packet sees the old one or the new one. All pins stay the link's.
    pub(crate) fn update(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        /// `struct { … } link_update` of `union bpf_attr`.
        #[repr(C)]
        struct Update {
            link: i32,
            program: i32,
            flags: u32,
            old_program: u32,
        }
        let mut update = Update {
            link: self.0.as_raw_fd(),
            program: program.as_raw_fd(),
            flags: 0,
            old_program: 0,
        };
        bpf(bpf_cmd::BPF_LINK_UPDATE, &mut update).map(drop)
    }

    /// Detaches the program at once, whoever has pinned the link: the kernel releases a removed pin
    /// only a while later (`bpf_free_inode()` in kernel/bpf/inode.c runs after a grace period).
    pub(crate) fn detach(&self) -> io::Result<()> {
        /// `struct { … } link_detach` of `union bpf_attr`.
        #[repr(C)]
        struct Detach {
            link: i32,
        }
        let mut detach = Detach {
            link: self.0.as_raw_fd(),
        };
        bpf(bpf_cmd::BPF_LINK_DETACH, &mut detach).map(drop)
    }

    /// Gives it a name in the BPF file system, besides those it has.
    pub(crate) fn pin(&self, path: &Path) -> io::Result<()> {
        let name = name_of(path)?;
        let mut pin = PinnedObject {
            path: name.as_ptr().addr() as u64,
            descriptor: self.0.as_raw_fd(),
            flags: 0,
        };
        bpf(bpf_cmd::BPF_OBJ_PIN, &mut pin).map(drop)
    }

    pub(crate) fn info(&self) -> io::Result<LinkInfo> {
        /// `struct bpf_link_info`, as far as it matters; the kernel fills in as much as is asked for.
        #[repr(C)]
        #[derive(Default)]
        struct Info {
            kind: u32,
            id: u32,
            program: u32,
            padding: u32,
            // Of XDP and TCX links; the beginning of something else in others.
            interface: u32,
            attach_type: u32,
        }
        /// `struct { … } info` of `union bpf_attr`.
        #[repr(C)]
        struct Ask {
            descriptor: i32,
            length: u32,
            info: u64,
        }
        let mut info = Info::default();
        let mut ask = Ask {
            descriptor: self.0.as_raw_fd(),
            length: size_of::<Info>() as u32,
            info: ptr::from_mut(&mut info).addr() as u64,
        };
        bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut ask)?;
        let hook = match bpf_link_type::try_from(info.kind) {
            Ok(bpf_link_type::BPF_LINK_TYPE_XDP) => Some(Hook::Xdp),
            Ok(bpf_link_type::BPF_LINK_TYPE_TCX)
                if info.attach_type == bpf_attach_type::BPF_TCX_INGRESS as u32 =>
            {
                Some(Hook::TcxIngress)
            }
            Ok(bpf_link_type::BPF_LINK_TYPE_TCX) => Some(Hook::TcxEgress),
            _ => None,
        };
        Ok(LinkInfo {
            id: info.id,
            program: info.program,
            hook,
            interface: if hook.is_some() { info.interface } else { 0 },
        })
    }
}

const fn attach_type(direction: Direction) -> bpf_attach_type {
    match direction {
        Direction::Ingress => bpf_attach_type::BPF_TCX_INGRESS,
        Direction::Egress => bpf_attach_type::BPF_TCX_EGRESS,
    }
}

/// What stands behind a name in the BPF file system.
pub(crate) enum Pinned {
    /// A map.
    Map(MapInfo),
    /// A program, by its name in the kernel.
    Program(String),
    /// A link.
    Link(Link, LinkInfo),
}

impl Pinned {
    /// Opens a pin.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let name = name_of(path)?;
        let mut get = PinnedObject {
            path: name.as_ptr().addr() as u64,
            descriptor: 0,
            flags: 0,
        };
        let descriptor = bpf_descriptor(bpf_cmd::BPF_OBJ_GET, &mut get)?;
        // Which type it is tells only the name of its anonymous file.
        let link = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
        match fs::read_link(link)?.to_str() {
            Some("anon_inode:bpf-map") => MapInfo::from_pin(path)
                .map(Self::Map)
                .map_err(io::Error::other),
            Some("anon_inode:bpf-prog") => {
                let info = aya::programs::ProgramInfo::from_pin(path).map_err(io::Error::other)?;
                Ok(Self::Program(
                    info.name_as_str().unwrap_or_default().to_owned(),
                ))
            }
            // The latter for the descriptor that created the link.
            Some("anon_inode:bpf-link" | "anon_inode:bpf_link") => {
                let link = Link(descriptor);
                let info = link.info()?;
                Ok(Self::Link(link, info))
            }
            _ => Err(io::Error::other("of an unknown type")),
        }
    }

    /// Whether the relay, in any version, has pinned this as `name`. Maps have their own names there,
    /// programs begin with `relay_`; a link's program cannot be seen without CAP_SYS_ADMIN, so the
    /// name of the pin decides.
    pub(crate) fn is_ours(&self, name: &str) -> bool {
        match self {
            Self::Map(info) => info.name_as_str() == Some(name),
            Self::Program(program) => program.starts_with(names::PROGRAM_PREFIX),
            Self::Link(_, info) => info.hook.is_some() && name.ends_with(names::LINK_SUFFIX),
        }
    }
}

/// `BPF_OBJ_*` of `union bpf_attr`.
#[repr(C)]
struct PinnedObject {
    path: u64,
    descriptor: i32,
    flags: u32,
}

/// Opens a pinned map for reading alone: nobody can write through the descriptor.
pub(super) fn open_read_only(path: &Path) -> io::Result<OwnedFd> {
    let name = name_of(path)?;
    let mut get = PinnedObject {
        path: name.as_ptr().addr() as u64,
        descriptor: 0,
        flags: BPF_F_RDONLY,
    };
    bpf_descriptor(bpf_cmd::BPF_OBJ_GET, &mut get)
}

fn name_of(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// A `bpf` command that returns a descriptor.
fn bpf_descriptor<T>(command: bpf_cmd, attributes: &mut T) -> io::Result<OwnedFd> {
    let descriptor = i32::try_from(bpf(command, attributes)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// A `bpf` command.
pub(super) fn bpf<T>(command: bpf_cmd, attributes: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads and writes `size_of::<T>()` bytes of `attributes`, whose pointers
    // describe live buffers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_long,
            ptr::from_mut(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}
