//! The machine and its kernel.

use super::{About, Finding, Group};
use crate::{doctor::facts::HostFacts, privileges};

const HOST: About = About(Group::Host);

pub(super) fn findings(host: &HostFacts) -> Vec<Finding> {
    vec![
        kernel(host),
        features(host),
        btf(host),
        jit(host),
        lockdown(host),
        capabilities(host),
        memlock(host),
        bpffs(host),
        statistics(host),
    ]
}

fn kernel(host: &HostFacts) -> Finding {
    match privileges::check_kernel(&host.kernel) {
        Ok(()) => HOST.ok("kernel_version", format!("Linux {}", host.kernel)),
        Err(error) => HOST.problem(
            "kernel_version",
            error,
            "apt-get install linux-image-amd64 && reboot".to_owned(),
        ),
    }
}

fn features(host: &HostFacts) -> Finding {
    match &host.refused {
        None => HOST.ok(
            "kernel_features",
            format!(
                "it takes the relay's programs and maps{}",
                match host.tcx {
                    Some(true) => ", and has TCX",
                    Some(false) => "; it has no TCX (Linux 6.6): TC mode uses filters of clsact",
                    None => "",
                }
            ),
        ),
        // Then that is what to mend.
        Some(cause) if !host.missing_capabilities.is_empty() => HOST.warning(
            "kernel_features",
            format!("not to be told without capabilities: {cause}"),
            None,
        ),
        Some(cause) => HOST.problem(
            "kernel_features",
            format!("the kernel refuses the relay's programs or maps: {cause}"),
            None,
        ),
    }
}

fn btf(host: &HostFacts) -> Finding {
    if host.btf {
        HOST.ok("btf", "the kernel describes its types")
    } else {
        HOST.warning(
            "btf",
            "the kernel has no BTF of its own (CONFIG_DEBUG_INFO_BTF): the relay needs none, but other BPF tools do",
            "apt-get install linux-image-amd64 && reboot".to_owned(),
        )
    }
}

fn jit(host: &HostFacts) -> Finding {
    match host.jit {
        Some(true) => HOST.ok("jit", "BPF programs run as machine code"),
        Some(false) => HOST.warning(
            "jit",
            "BPF programs are interpreted, at several times the cost per packet",
            "sysctl -w net.core.bpf_jit_enable=1".to_owned(),
        ),
        None => HOST.ok("jit", "not known: no program could be loaded"),
    }
}

fn lockdown(host: &HostFacts) -> Finding {
    // Kernel lockdown takes the tracing helpers away (LOCKDOWN_BPF_READ_KERNEL in kernel/bpf/helpers.c),
    // none of which the relay uses.
    match host.lockdown.as_deref() {
        Some("confidentiality") if host.refused.is_some() => HOST.problem(
            "lockdown",
            "lockdown is `confidentiality`, and the kernel refuses the relay's programs",
            "sed -i 's/lockdown=confidentiality/lockdown=integrity/' /etc/default/grub && update-grub && reboot"
                .to_owned(),
        ),
        Some(mode) => HOST.ok(
            "lockdown",
            format!("`{mode}`, which takes nothing from the relay"),
        ),
        None => HOST.ok("lockdown", "the kernel has none, or does not show it"),
    }
}

fn capabilities(host: &HostFacts) -> Finding {
    if host.missing_capabilities.is_empty() {
        HOST.ok("capabilities", "all that attaching needs")
    } else {
        HOST.problem(
            "capabilities",
            format!(
                "this process lacks {}: what follows is incomplete",
                host.missing_capabilities.join(" and ")
            ),
            "sudo relay-user doctor".to_owned(),
        )
    }
}

fn memlock(host: &HostFacts) -> Finding {
    // Since Linux 5.11 BPF memory counts for the memory cgroup (commit 755e5d55367a), and the oldest
    // kernel that the relay takes is newer.
    match host.memlock {
        None => HOST.ok("memlock", "unlimited"),
        Some(bytes) => HOST.ok(
            "memlock",
            format!(
                "{} KiB, which does not limit BPF since Linux 5.11",
                bytes / 1024
            ),
        ),
    }
}

fn bpffs(host: &HostFacts) -> Finding {
    if host.bpffs {
        HOST.ok("bpffs", "mounted at /sys/fs/bpf")
    } else {
        HOST.warning(
            "bpffs",
            "no BPF file system at /sys/fs/bpf: `attach` mounts it, which needs CAP_SYS_ADMIN",
            "mount -t bpf bpf /sys/fs/bpf".to_owned(),
        )
    }
}

fn statistics(host: &HostFacts) -> Finding {
    match host.bpf_statistics {
        Some(true) => HOST.warning(
            "bpf_statistics",
            "the kernel takes the time of every run of every BPF program, which costs on each packet",
            "sysctl -w kernel.bpf_stats_enabled=0".to_owned(),
        ),
        Some(false) => HOST.ok("bpf_statistics", "off, so they cost nothing"),
        None => HOST.ok("bpf_statistics", "the kernel has none"),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::judged, *};
    use crate::doctor::Level;

    fn sound() -> HostFacts {
        HostFacts {
            kernel: "6.1.0-18-amd64".to_owned(),
            refused: None,
            jit: Some(true),
            tcx: Some(true),
            btf: true,
            lockdown: Some("none".to_owned()),
            missing_capabilities: Vec::new(),
            memlock: Some(8 << 20),
            bpffs: true,
            bpf_statistics: Some(false),
        }
    }

    #[test]
    fn a_sound_host_has_no_trouble() {
        for finding in findings(&sound()) {
            assert_eq!((finding.level, finding.mend), (Level::Ok, None));
        }
    }

    #[test]
    fn each_trouble_is_told_with_its_remedy() {
        type Spoil = fn(&mut HostFacts);
        let cases: [(&str, Spoil, Level, &str); 8] = [
            (
                "kernel_version",
                |host| host.kernel = "5.10.0".to_owned(),
                Level::Problem,
                "linux-image",
            ),
            (
                "btf",
                |host| host.btf = false,
                Level::Warning,
                "linux-image",
            ),
            (
                "jit",
                |host| host.jit = Some(false),
                Level::Warning,
                "net.core.bpf_jit_enable=1",
            ),
            (
                "lockdown",
                |host| {
                    host.lockdown = Some("confidentiality".to_owned());
                    host.refused = Some("EPERM".to_owned());
                },
                Level::Problem,
                "lockdown=integrity",
            ),
            (
                "capabilities",
                |host| host.missing_capabilities = vec!["CAP_BPF".to_owned()],
                Level::Problem,
                "sudo relay-user doctor",
            ),
            (
                "bpffs",
                |host| host.bpffs = false,
                Level::Warning,
                "mount -t bpf",
            ),
            (
                "bpf_statistics",
                |host| host.bpf_statistics = Some(true),
                Level::Warning,
                "bpf_stats_enabled=0",
            ),
            (
                "kernel_features",
                |host| host.refused = Some("EINVAL".to_owned()),
                Level::Problem,
                "",
            ),
        ];
        for (id, spoil, level, mend) in cases {
            let mut host = sound();
            spoil(&mut host);
            let findings = findings(&host);
            let (found, command) = judged(&findings, id);
            assert_eq!(found, level, "{id}");
            assert!(
                command.unwrap_or_default().contains(mend),
                "{id}: {command:?}"
            );
        }
    }

    #[test]
    fn what_no_limit_touches_is_no_trouble() {
        let host = HostFacts {
            memlock: Some(64 << 10),
            lockdown: Some("integrity".to_owned()),
            tcx: Some(false),
            jit: None,
            ..sound()
        };
        assert!(
            findings(&host)
                .iter()
                .all(|finding| finding.level == Level::Ok)
        );
    }
}
