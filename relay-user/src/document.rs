//! TOML files that people write: read with bounds, and refused with the place, what stands there, and
//! the remedy.

use std::{
    fmt, fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

/// Longest file read, in bytes. All that any of them can need is a tenth.
const LONGEST_FILE: u64 = 65_536;

/// Where in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Position {
    /// The file.
    pub path: PathBuf,
    /// Line, from 1.
    pub line: usize,
    /// Character in the line, from 1.
    pub column: usize,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.path.display(), self.line, self.column)
    }
}

/// Why a file was refused. No text quotes it, for it could hold a misplaced secret.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// The file cannot be opened or read.
    #[error("cannot read the {what} {}: {source}", path.display())]
    Read {
        /// What it should be.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Longer than any.
    #[error("{} is longer than {LONGEST_FILE} bytes: this is not a {what} of relay-user", path.display())]
    TooLong {
        /// What it should be.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Not UTF-8.
    #[error("{} is not UTF-8 text: this is not a {what} of relay-user", path.display())]
    NotText {
        /// What it should be.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Not TOML.
    #[error("{at}: {message}")]
    Syntax {
        /// Where the parser stopped.
        at: Position,
        /// What it said.
        message: String,
    },
    /// A key this program does not know.
    #[error("{at}: unknown key `{key}`: did you mean `{nearest}`?")]
    UnknownKey {
        /// Where the key is.
        at: Position,
        /// The key, with its table.
        key: String,
        /// The known key that looks most like it, with its table.
        nearest: &'static str,
    },
    /// A value of another type.
    #[error("{at}: `{key}` is {found}: write {wanted}")]
    Type {
        /// Where the value is.
        at: Position,
        /// The key, with its table.
        key: &'static str,
        /// What stands there.
        found: &'static str,
        /// What should.
        wanted: &'static str,
    },
}

/// Reads the text of a file that should be a `what`.
///
/// # Errors
/// [`DocumentError::Read`], [`DocumentError::TooLong`], [`DocumentError::NotText`].
pub(crate) fn read(path: &Path, what: &'static str) -> Result<String, DocumentError> {
    let failed = |source| DocumentError::Read {
        what,
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    fs::File::open(path)
        .map_err(failed)?
        .take(LONGEST_FILE + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    let path = path.to_owned();
    if bytes.len() as u64 > LONGEST_FILE {
        return Err(DocumentError::TooLong { what, path });
    }
    String::from_utf8(bytes).map_err(|_| DocumentError::NotText { what, path })
}

/// A file's text, where it came from, and what may stand in it.
#[derive(Clone, Copy)]
pub(crate) struct Document<'a> {
    pub(crate) path: &'a Path,
    pub(crate) text: &'a str,
    /// Every key there is, with its table. What a misspelt key is compared with.
    pub(crate) keys: &'static [&'static str],
}

/// A value, its full key, and its first byte in the document.
#[derive(Clone, Copy)]
pub(crate) struct Entry<'a> {
    pub(crate) key: &'static str,
    pub(crate) value: &'a DeValue<'a>,
    pub(crate) start: usize,
}

impl<'a> Document<'a> {
    /// The whole.
    pub(crate) fn parsed(&self) -> Result<Spanned<DeTable<'a>>, DocumentError> {
        DeTable::parse(self.text).map_err(|error| DocumentError::Syntax {
            at: self.position(error.span().map_or(0, |span| span.start)),
            // Not its `Display`, which quotes the line.
            message: error.message().to_owned(),
        })
    }

    /// The entries of a table, all of known keys. `table` is the prefix of its keys.
    pub(crate) fn entries<'t>(
        &self,
        content: &'t DeTable<'t>,
        table: &str,
    ) -> Result<Vec<Entry<'t>>, DocumentError> {
        content
            .iter()
            .map(|(name, value)| {
                let key = format!("{table}{}", name.get_ref());
                match self
                    .keys
                    .iter()
                    .find(|known| **known == key && !name.get_ref().contains('.'))
                {
                    Some(known) => Ok(Entry {
                        key: known,
                        value: value.get_ref(),
                        start: value.span().start,
                    }),
                    None => Err(DocumentError::UnknownKey {
                        at: self.position(name.span().start),
                        nearest: self.nearest(&key),
                        key: printable(&key),
                    }),
                }
            })
            .collect()
    }

    /// The known key most like `key`. The last part weighs too, for a key in the wrong table.
    fn nearest(&self, key: &str) -> &'static str {
        let last = |key: &str| key.rsplit('.').next().unwrap_or_default().replace('_', "-");
        let likeness = |known: &str| {
            let whole = strsim::jaro_winkler(key, known);
            (
                whole.max(strsim::jaro_winkler(&last(key), &last(known))),
                whole,
            )
        };
        self.keys
            .iter()
            .copied()
            .max_by(|a, b| {
                let ((a, a_whole), (b, b_whole)) = (likeness(a), likeness(b));
                a.total_cmp(&b).then(a_whole.total_cmp(&b_whole))
            })
            .unwrap_or_default()
    }

    pub(crate) fn text<'t>(&self, entry: &'t Entry<'_>) -> Result<&'t str, DocumentError> {
        entry
            .value
            .as_str()
            .ok_or_else(|| self.wrong_type(entry, "a string in quotes"))
    }

    pub(crate) fn flag(&self, entry: &Entry<'_>) -> Result<bool, DocumentError> {
        match entry.value {
            DeValue::Boolean(flag) => Ok(*flag),
            _ => Err(self.wrong_type(entry, "true or false, without quotes")),
        }
    }

    pub(crate) fn wrong_type(&self, entry: &Entry<'_>, wanted: &'static str) -> DocumentError {
        let found = match entry.value {
            DeValue::String(_) => "a string",
            DeValue::Integer(_) => "a whole number",
            DeValue::Float(_) => "a number with a fraction",
            DeValue::Boolean(_) => "true or false",
            DeValue::Datetime(_) => "a date or a time",
            DeValue::Array(_) => "a list",
            DeValue::Table(_) => "a table",
        };
        DocumentError::Type {
            at: self.position(entry.start),
            key: entry.key,
            found,
            wanted,
        }
    }

    pub(crate) fn position(&self, offset: usize) -> Position {
        let before = self.text.get(..offset).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Position {
            path: self.path.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }
}

/// The text without characters that a terminal would obey.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}
