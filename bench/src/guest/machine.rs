//! The machine that the guest runs in: QEMU, which executes one instruction every nanosecond of the guest's time, so
//! that time in the guest is a number of instructions, whatever else goes on here.

use std::{
    fs::{self, File},
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use cpio::newc::{self, ModeFileType};
use relay_tests::namespace::Host;

use super::debian::Bookworm;

/// QEMU.
pub(super) const PROGRAM: &str = "qemu-system-x86_64";

/// How long the guest may run. What takes a guest four minutes takes a busy machine ten.
const PATIENCE: Duration = Duration::from_secs(1200);

/// Modules without which the guest sees no files, and then its network interfaces.
const MODULES: [&str; 5] = ["virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_net"];

/// The guest's clock counts instructions, and leaps where it has nothing to do. With either of the last two features
/// `rep movsb` would be one instruction for each byte (`-icount` counts iterations).
const CLOCK: [&str; 8] = [
    "-accel",
    "tcg,thread=single,tb-size=512",
    "-icount",
    "shift=0,sleep=off",
    "-smp",
    "1",
    "-cpu",
    "max,la57=off,erms=off,fsrm=off",
];

/// What a frame takes from one end of the wire to the other, ns. With it all that happens does so by the guest's clock;
/// without, whenever a thread of this machine comes round to it.
const WIRE: u32 = 10_000;

const KERNEL_ARGUMENTS: &str = "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr tsc=reliable \
     no_timer_check audit=0 net.ifnames=0 random.trust_cpu=1";

/// Where the guest has the folder that it shares with this machine.
pub(super) const SHARE: &str = "/run/share";

/// Files in that folder.
const INITRD: &str = "initrd";
const CONSOLE: &str = "console";

/// The first process. The guest's root is this machine's, read-only, below a file system in memory.
const INIT: &str = r#"#!/bin/busybox sh
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs devtmpfs /dev
for module in $($bb cat /modules); do $bb insmod /$module; done
plan9=trans=virtio,version=9p2000.L,msize=512000
$bb mount -t 9p -o ro,cache=loose,$plan9 root /lower
$bb mount -t tmpfs tmpfs /upper
$bb mkdir /upper/files /upper/work
$bb mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /root
for folder in proc sys dev; do $bb mount --move /$folder /root/$folder; done
$bb mount -t tmpfs -o mode=755 tmpfs /root/run
$bb mount -t bpf bpf /root/sys/fs/bpf
$bb mkdir -p /root/run/share /root/dev/pts /root/lib/modules
$bb mount -t devpts devpts /root/dev/pts
$bb mount -t 9p -o rw,$plan9 share /root/run/share
exec $bb switch_root /root "#;

/// A machine that runs a program and then goes off.
pub(super) struct Machine<'a> {
    pub(super) debian: &'a Bookworm,
}

impl Machine<'_> {
    /// Runs a script of the shell as root, on this machine's files and with `share` at [`SHARE`].
    ///
    /// # Errors
    /// The guest dies, takes too long, or the script fails: the text holds the end of what it printed.
    pub(super) fn run(&self, script: &str, share: &Path) -> Result<()> {
        fs::write(share.join(INITRD), self.initrd()?)?;
        fs::write(share.join("start"), self.start(script)?)?;
        let mut qemu = self.qemu(share)?;
        let log = File::create(share.join("qemu"))?;
        qemu.stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut process = Host::this("this machine")?.spawn(qemu)?;
        let ended = process.wait(PATIENCE);
        let read = |file: &str| fs::read_to_string(share.join(file));
        let told = ["qemu", CONSOLE].map(|file| read(file).unwrap_or_default());
        let told = last_lines(&told.concat());
        let ended = ended.with_context(|| told.clone())?;
        ensure!(ended.success(), "QEMU: {ended}: {told}");
        match read("status").as_deref().map(str::trim) {
            Ok("0") => Ok(()),
            Ok(status) => bail!("it failed in the guest ({status}): {told}"),
            Err(_) => bail!("the guest died: {told}"),
        }
    }

    /// QEMU with the guest's clock, files and network, not yet started.
    fn qemu(&self, share: &Path) -> Result<Command> {
        let kernel = format!("boot/vmlinuz-{}", self.debian.kernel()?);
        let shared = plain(share)?;
        let mut qemu = Command::new(PROGRAM);
        qemu.args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-machine", "q35", "-m", "2048"])
            .args(CLOCK)
            .arg("-kernel")
            .arg(self.debian.path(&kernel))
            .arg("-initrd")
            .arg(share.join(INITRD))
            .args(["-append", KERNEL_ARGUMENTS, "-chardev"])
            .arg(format!("file,id=console,path={shared}/{CONSOLE}"))
            .args(["-serial", "chardev:console", "-device", "virtio-rng-pci"]);
        for (tag, folder) in [("root", "/,readonly=on"), ("share", shared)] {
            qemu.arg("-fsdev")
                .arg(format!(
                    "local,id={tag},security_model=none,multidevs=remap,path={folder}"
                ))
                .arg("-device")
                .arg(format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
        }
        for end in 0..2 {
            qemu.arg("-netdev")
                .arg(format!("hubport,id=wire{end},hubid=0"))
                .arg("-device")
                .arg(format!(
                    "virtio-net-pci,netdev=wire{end},mac=52:54:00:00:00:0{end},\
                     ioeventfd=off,tx=timer,x-txtimer={WIRE}"
                ));
        }
        Ok(qemu)
    }

    /// What the shell of the guest runs when all files are there.
    fn start(&self, script: &str) -> Result<String> {
        let root = plain(self.debian.root())?;
        let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        Ok(format!(
            "export PATH={path} HOME=/root\n\
             '{root}/bin/busybox' mount --bind '{root}/lib/modules' /lib/modules\n\
             ( {script} ) < /dev/null > /dev/console 2>&1\n\
             echo $? > {SHARE}/status\n\
             '{root}/bin/busybox' sync\n\
             '{root}/bin/busybox' poweroff -f\n"
        ))
    }

    /// A file system in memory with what it takes to see the others.
    fn initrd(&self) -> Result<Vec<u8>> {
        let mut archive = Vec::new();
        for folder in ["bin", "proc", "sys", "dev", "lower", "upper", "root"] {
            let entry = newc::Builder::new(folder)
                .mode(0o755)
                .set_mode_file_type(ModeFileType::Directory);
            entry.write(&mut archive, 0).finish()?;
        }
        let busybox = fs::read(self.debian.path("bin/busybox")).context("busybox")?;
        let init = format!("{INIT}/bin/sh {SHARE}/start\n");
        let mut files = vec![
            ("bin/busybox".to_owned(), busybox),
            ("init".to_owned(), init.into_bytes()),
        ];
        let folder = self
            .debian
            .path(&format!("lib/modules/{}", self.debian.kernel()?));
        let known = fs::read_to_string(folder.join("modules.dep"))?;
        let mut names = String::new();
        for path in with_dependencies(&known, &MODULES)? {
            let module = fs::read(folder.join(path)).with_context(|| path.to_owned())?;
            let name = file_name(path);
            names += &format!("{name}\n");
            files.push((name.to_owned(), module));
        }
        files.push(("modules".to_owned(), names.into_bytes()));
        for (name, content) in files {
            let entry = newc::Builder::new(&name)
                .mode(0o755)
                .set_mode_file_type(ModeFileType::Regular);
            let mut writer = entry.write(&mut archive, content.len() as u32);
            writer.write_all(&content)?;
            writer.finish()?;
        }
        newc::trailer(&mut archive)?;
        Ok(archive)
    }
}

/// A path that is one word between single quotes of the shell, and in an option of QEMU.
///
/// # Errors
/// It is not.
pub(super) fn plain(path: &Path) -> Result<&str> {
    let plain = path.to_str().filter(|path| !path.contains([',', '\'']));
    plain.with_context(|| {
        format!(
            "{}: neither commas nor quotes can be in this path, and only UTF-8",
            path.display()
        )
    })
}

/// The files of these modules and of all that they need, in an order to load them in (modules.dep(5): behind each
/// module are those that it needs, the first of them needing the others).
fn with_dependencies<'a>(known: &'a str, modules: &[&str]) -> Result<Vec<&'a str>> {
    let mut paths = Vec::new();
    for module in modules {
        let line = known.lines().find_map(|line| {
            let (path, needed) = line.split_once(':')?;
            let right = file_name(path).strip_suffix(".ko") == Some(*module);
            right.then_some((path, needed))
        });
        let (path, needed) = line.with_context(|| format!("the kernel has no module {module}"))?;
        for path in needed.split_whitespace().rev().chain([path]) {
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
    }
    Ok(paths)
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn last_lines(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_behind_what_they_need() {
        let known = "kernel/net/9p/9p.ko: kernel/net/9pnet.ko kernel/fs/netfs.ko\n\
             kernel/net/9pnet.ko:\n\
             kernel/fs/netfs.ko:\n\
             kernel/net/9pnet_virtio.ko: kernel/net/9pnet.ko\n";
        let paths = with_dependencies(known, &["9p", "9pnet_virtio"]).expect("known modules");
        let names: Vec<_> = paths.into_iter().map(file_name).collect();
        assert_eq!(names, ["netfs.ko", "9pnet.ko", "9p.ko", "9pnet_virtio.ko"]);
        assert!(with_dependencies(known, &["e1000"]).is_err());
    }

    #[test]
    fn a_path_that_would_be_two_words_is_refused() {
        assert_eq!(plain(Path::new("/tmp/a b")).expect("a path"), "/tmp/a b");
        for path in ["/tmp/a,b", "/tmp/a'b"] {
            assert!(plain(Path::new(path)).is_err(), "{path}");
        }
    }
}
