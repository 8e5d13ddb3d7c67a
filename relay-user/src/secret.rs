//! The AMI secret: where it may come from, and what never shows it.

use std::{
    fmt,
    fs::OpenOptions,
    io::{self, Read as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use nix::libc;

/// The longest secret accepted, in bytes. Asterisk reads AMI lines of about 1 KiB.
pub const LONGEST: usize = 1024;

/// A secret. It prints as `***`, and its memory is overwritten when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

/// Why a text is no secret that AMI could carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// Nothing but a line end.
    #[error("the secret is empty: write the `secret` of the manager.conf user into it")]
    Empty,
    /// Longer than [`LONGEST`].
    #[error("the secret is longer than {LONGEST} bytes: give only the secret, on one line")]
    TooLong,
    /// A line end or another control character inside: it would end the AMI header it stands in.
    #[error(
        "the secret holds a control character or a second line: give only the secret, on one line"
    )]
    ControlCharacter,
    /// Not UTF-8.
    #[error("the secret is not UTF-8 text: give only the secret, on one line")]
    NotText,
}

/// Why a secret file was refused. The text never holds the secret.
#[derive(Debug, thiserror::Error)]
pub enum SecretFileError {
    /// It cannot be opened or read.
    #[error("cannot read the secret file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A directory, device or pipe.
    #[error("the secret file {} is not a regular file: put the secret into a file of its own", .0.display())]
    NotAFile(PathBuf),
    /// Its mode lets group or others at it.
    #[error("the secret file {path} has mode {mode:04o}, so that others can get at it: run `chmod 600 {path}`", path = path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Its content is no secret.
    #[error("secret file {}: {source}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: SecretError,
    },
}

impl Secret {
    /// Takes a secret as it stands in a file or an environment variable; one line end at its end
    /// is not part of it.
    ///
    /// # Errors
    /// Every [`SecretError`].
    pub fn new(text: String) -> Result<Self, SecretError> {
        // Owned from here on, so that a refused secret is overwritten too.
        let mut secret = Self(text);
        if secret.0.ends_with('\n') {
            secret.0.pop();
            if secret.0.ends_with('\r') {
                secret.0.pop();
            }
        }
        if secret.0.is_empty() {
            return Err(SecretError::Empty);
        }
        if secret.0.len() > LONGEST {
            return Err(SecretError::TooLong);
        }
        if secret.0.chars().any(char::is_control) {
            return Err(SecretError::ControlCharacter);
        }
        Ok(secret)
    }

    /// Reads a secret file that nobody but its owner can get at.
    ///
    /// # Errors
    /// Every [`SecretFileError`].
    pub fn read(path: &Path) -> Result<Self, SecretFileError> {
        let failed = |source| SecretFileError::Read {
            path: path.to_owned(),
            source,
        };
        // Non-blocking, because opening a pipe would otherwise wait for its writer.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path)
            .map_err(failed)?;
        // Of the open file, so that a file put in its place meanwhile is not the one judged.
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(SecretFileError::NotAFile(path.to_owned()));
        }
        let mode = metadata.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(SecretFileError::Exposed {
                path: path.to_owned(),
                mode,
            });
        }
        let content = |source| SecretFileError::Content {
            path: path.to_owned(),
            source,
        };
        // Room for the longest secret, a line end, and one byte that tells a longer one. Reserved at
        // once: a growing buffer would leave copies behind.
        let mut bytes = Vec::with_capacity(LONGEST + 3);
        file.take(LONGEST as u64 + 3)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
        let text = String::from_utf8(bytes).map_err(|_| content(SecretError::NotText))?;
        Self::new(text).map_err(content)
    }

    /// The secret itself, for the login alone.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.0).into_bytes();
        bytes.fill(0);
        // Otherwise the compiler may leave the fill out, as nothing reads it.
        std::hint::black_box(&bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn file(content: &[u8], mode: u32) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("secret");
        fs::write(&path, content).expect("secret file");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("mode");
        (directory, path)
    }

    #[test]
    fn a_secret_file_loses_one_line_end() {
        for content in ["s3cret", "s3cret\n", "s3cret\r\n"] {
            let (_directory, path) = file(content.as_bytes(), 0o600);
            assert_eq!(Secret::read(&path).expect(content).expose(), "s3cret");
        }
        let (_directory, path) = file(format!("{}\r\n", "x".repeat(LONGEST)).as_bytes(), 0o400);
        assert_eq!(
            Secret::read(&path).expect("longest").expose().len(),
            LONGEST
        );
    }

    #[test]
    fn bad_secret_files_are_refused_with_the_remedy() {
        for (content, mode, fragment) in [
            (&b"s3cret"[..], 0o640, "chmod 600"),
            (b"s3cret", 0o604, "mode 0604"),
            (b"s3cret", 0o620, "chmod 600"),
            (b"", 0o600, "empty"),
            (b"\n", 0o600, "empty"),
            (b"one\ntwo\n", 0o600, "second line"),
            (b"\xff\xfe", 0o600, "UTF-8"),
            (&[b'x'; LONGEST + 1], 0o600, "longer than 1024"),
            (&[b'x'; 1 << 20], 0o600, "longer than 1024"),
        ] {
            let (_directory, path) = file(content, mode);
            let error = Secret::read(&path).expect_err(fragment).to_string();
            assert!(error.contains(fragment), "{error}");
            assert!(error.contains(&path.display().to_string()), "{error}");
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn a_pipe_or_a_directory_is_no_secret_file() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).expect("pipe");
        for path in [pipe.as_path(), directory.path()] {
            let error = Secret::read(path).expect_err("no file").to_string();
            assert!(error.contains("not a regular file"), "{error}");
        }
        let error = Secret::read(&directory.path().join("none"))
            .expect_err("absent")
            .to_string();
        assert!(error.contains("No such file"), "{error}");
    }

    #[test]
    fn a_secret_does_not_print() {
        let secret = Secret::new("s3cret".into()).expect("secret");
        assert_eq!(
            format!("{secret} {secret:?} {:?}", Some(&secret)),
            "*** *** Some(***)"
        );
    }
}
