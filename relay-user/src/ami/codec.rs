//! AMI on the wire: a banner line, then messages, each ended by a blank line.

use bytes::{Buf, BytesMut};
use tokio_util::codec::Decoder;

use super::message::{Message, excerpt};

/// Longest line taken, in bytes without its end. Asterisk's own variables rarely pass 4 KiB; this
/// leaves room for a dialplan that keeps a document in one.
pub const MAX_LINE: usize = 64 * 1024;
/// Longest message taken, in bytes with its line ends.
pub const MAX_MESSAGE: usize = 256 * 1024;
/// How every AMI server introduces itself (`Asterisk Call Manager/11.0.0`).
const BANNER: &[u8] = b"Asterisk Call Manager";
const MAX_BANNER: usize = 256;

/// Why the bytes are no AMI. The connection is of no use after any of these.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The first bytes are not the banner.
    #[error("not an AMI server: it greets with {0} instead of \"Asterisk Call Manager/…\"")]
    NotAmi(String),
    /// A line beyond [`MAX_LINE`].
    #[error("a line is longer than {MAX_LINE} bytes; it begins with {0}")]
    LineTooLong(String),
    /// A message beyond [`MAX_MESSAGE`].
    #[error("a message is longer than {MAX_MESSAGE} bytes; it begins with {0}")]
    MessageTooLong(String),
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// What the server sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// The greeting, once, first.
    Banner(String),
    /// Everything after it.
    Message(Message),
}

/// The decoder. Never holds back more than [`MAX_MESSAGE`] bytes, and looks at each byte once
/// however the stream is cut into segments.
#[derive(Debug, Default)]
pub struct Codec {
    greeted: bool,
    /// Bytes of the buffer already searched for a line end.
    searched: usize,
    /// Where the line being searched began.
    line: usize,
}

impl Codec {
    fn banner(&mut self, src: &mut BytesMut) -> Result<Option<Frame>, CodecError> {
        let end = src.iter().take(MAX_BANNER).position(|byte| *byte == b'\n');
        let seen = &src[..end.unwrap_or(src.len().min(MAX_BANNER))];
        let compared = seen.len().min(BANNER.len());
        if seen[..compared] != BANNER[..compared]
            || (end.is_some() && compared < BANNER.len())
            || (end.is_none() && seen.len() == MAX_BANNER)
        {
            return Err(CodecError::NotAmi(excerpt(seen)));
        }
        let Some(end) = end else { return Ok(None) };
        let banner = String::from_utf8_lossy(seen).trim().to_owned();
        src.advance(end + 1);
        self.greeted = true;
        Ok(Some(Frame::Banner(banner)))
    }

    fn message(&mut self, src: &mut BytesMut) -> Result<Option<Frame>, CodecError> {
        while let Some(offset) = src[self.searched..].iter().position(|byte| *byte == b'\n') {
            let end = self.searched + offset;
            self.check(src, end)?;
            let blank = matches!(&src[self.line..end], b"" | b"\r");
            if !blank {
                self.searched = end + 1;
                self.line = end + 1;
            } else if self.line == 0 {
                // A blank line with no message before it.
                src.advance(end + 1);
                self.searched = 0;
            } else {
                let message = Message::new(&src[..self.line]);
                src.advance(end + 1);
                self.searched = 0;
                self.line = 0;
                return Ok(Some(Frame::Message(message)));
            }
        }
        self.searched = src.len();
        self.check(src, src.len())?;
        Ok(None)
    }

    fn check(&self, src: &BytesMut, end: usize) -> Result<(), CodecError> {
        if end - self.line > MAX_LINE {
            return Err(CodecError::LineTooLong(excerpt(&src[self.line..end])));
        }
        if end > MAX_MESSAGE {
            return Err(CodecError::MessageTooLong(excerpt(src)));
        }
        Ok(())
    }
}

impl Decoder for Codec {
    type Item = Frame;
    type Error = CodecError;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<Frame>, CodecError> {
        if self.greeted {
            self.message(src)
        } else {
            self.banner(src)
        }
    }

    /// A message cut off by the end of the stream is dropped: half an answer is no answer.
    fn decode_eof(&mut self, src: &mut BytesMut) -> Result<Option<Frame>, CodecError> {
        let frame = self.decode(src)?;
        if frame.is_none() {
            src.clear();
        }
        Ok(frame)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ami::recording::Recording;

    /// Feeds segments as a socket would, and returns the frames and the most that was buffered.
    fn decode<'a>(
        segments: impl IntoIterator<Item = &'a [u8]>,
    ) -> (Vec<Frame>, Option<CodecError>, usize) {
        let mut codec = Codec::default();
        let mut buffer = BytesMut::new();
        let mut frames = Vec::new();
        let mut most = 0;
        for segment in segments {
            buffer.extend_from_slice(segment);
            loop {
                match codec.decode(&mut buffer) {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break,
                    Err(error) => return (frames, Some(error), most),
                }
            }
            most = most.max(buffer.len());
        }
        (frames, None, most)
    }

    fn texts(frames: &[Frame]) -> Vec<Vec<(String, String)>> {
        frames
            .iter()
            .map(|frame| match frame {
                Frame::Banner(banner) => vec![("banner".to_owned(), banner.clone())],
                Frame::Message(message) => message
                    .fields()
                    .map(|(key, value)| (key.to_owned(), value.to_owned()))
                    .collect(),
            })
            .collect()
    }

    #[test]
    fn a_recording_decodes_whole() {
        let bytes = Recording::load("01-native-call-dtmf-hold").server_bytes();
        let (frames, error, _) = decode([&bytes[..]]);
        assert!(error.is_none());
        assert_eq!(
            frames[0],
            Frame::Banner("Asterisk Call Manager/11.0.0".to_owned())
        );
        let blank_lines = bytes
            .windows(4)
            .filter(|window| window == b"\r\n\r\n")
            .count();
        assert_eq!(frames.len(), 1 + blank_lines);
    }

    #[test]
    fn line_feeds_alone_will_do() {
        let bytes = Recording::load("01-native-call-dtmf-hold").server_bytes();
        let bare: Vec<u8> = bytes
            .iter()
            .copied()
            .filter(|byte| *byte != b'\r')
            .collect();
        assert_eq!(
            texts(&decode([&bare[..]]).0),
            texts(&decode([&bytes[..]]).0)
        );
    }

    #[test]
    fn one_byte_at_a_time_is_the_same() {
        let bytes = Recording::load("03-mid-mixmonitor").server_bytes();
        assert_eq!(decode(bytes.chunks(1)).0, decode([&bytes[..]]).0);
    }

    #[test]
    fn garbage_instead_of_a_banner_is_quoted_and_bounded() {
        for garbage in [
            &b"SSH-2.0-OpenSSH_9.2\r\n"[..],
            b"\x16\x03\x01\0",
            b"Asterisk\n",
            b"{}",
        ] {
            let error = decode([garbage]).1.expect("no AMI").to_string();
            assert!(
                error.contains(&garbage[..garbage.len().min(8)].escape_ascii().to_string()),
                "{error}"
            );
        }
        let mut endless = b"Asterisk Call Manager".to_vec();
        endless.resize(5000, b'!');
        let error = decode([&endless[..]]).1.expect("no AMI").to_string();
        assert!(error.len() < 250, "{error}");
    }

    #[test]
    fn a_line_of_100_megabytes_is_refused_before_it_is_buffered() {
        let greeting: &[u8] = b"Asterisk Call Manager/11.0.0\r\nEvent: X\r\nValue: ";
        let chunk = vec![b'a'; 8192];
        let endless = std::iter::once(greeting).chain(std::iter::repeat_n(&chunk[..], 100 * 128));
        let (_, error, most) = decode(endless);
        assert!(
            matches!(error, Some(CodecError::LineTooLong(_))),
            "{error:?}"
        );
        assert!(most <= MAX_LINE + 8192, "{most}");
    }

    #[test]
    fn a_message_without_end_is_refused() {
        let line = format!("ChanVariable: {}\r\n", "b".repeat(1000));
        let greeting: &[u8] = b"Asterisk Call Manager/11.0.0\r\n";
        let endless =
            std::iter::once(greeting).chain(std::iter::repeat_n(line.as_bytes(), 100_000));
        let (_, error, most) = decode(endless);
        assert!(
            matches!(error, Some(CodecError::MessageTooLong(_))),
            "{error:?}"
        );
        assert!(most <= MAX_MESSAGE + 2048, "{most}");
    }

    #[test]
    fn invalid_utf8_is_tolerated() {
        let (frames, error, _) =
            decode([&b"Asterisk Call Manager/11\r\nEvent: Hold\r\nCallerIDName: M\xfcller\r\nChannel: PJSIP/a\r\n\r\n"[..]]);
        assert!(error.is_none());
        let Frame::Message(message) = &frames[1] else {
            panic!("{frames:?}")
        };
        assert_eq!(message.get("Channel"), Some("PJSIP/a"));
    }

    fn stream() -> impl Strategy<Value = Vec<u8>> {
        let line = "[A-Za-z]{1,8}: [ -~é]{0,20}";
        proptest::collection::vec((proptest::collection::vec(line, 1..5), any::<bool>()), 0..8)
            .prop_map(|messages| {
                let mut bytes = b"Asterisk Call Manager/11.0.0\r\n".to_vec();
                for (lines, crlf) in messages {
                    let end = if crlf { "\r\n" } else { "\n" };
                    for line in lines {
                        bytes.extend_from_slice(format!("{line}{end}").as_bytes());
                    }
                    bytes.extend_from_slice(end.as_bytes());
                }
                bytes
            })
    }

    proptest! {
        #[test]
        fn segments_do_not_matter(bytes in stream(), cuts in proptest::collection::vec(1usize..40, 1..20)) {
            let whole = decode([&bytes[..]]);
            prop_assert!(whole.1.is_none());
            let mut rest = &bytes[..];
            let mut segments = Vec::new();
            for cut in cuts.iter().cycle() {
                let (segment, tail) = rest.split_at(rest.len().min(*cut));
                segments.push(segment);
                rest = tail;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(decode(segments).0, whole.0);
        }

        #[test]
        fn no_bytes_panic(bytes in any::<Vec<u8>>(), greeted in any::<bool>(), cut in 1usize..30) {
            let mut stream = if greeted { b"Asterisk Call Manager/1\n".to_vec() } else { Vec::new() };
            stream.extend_from_slice(&bytes);
            for frame in decode(stream.chunks(cut)).0 {
                if let Frame::Message(message) = frame {
                    let _ = (message.event(), message.fields().count(), message.variable("a"));
                }
            }
        }
    }
}
