//! Addresses in JSON, written fast: in a long list there are ten of them for each pair, and a third of the time that it
//! takes to write would go into their [`Display`](std::fmt::Display).

use std::net::SocketAddr;

use arrayvec::ArrayString;
use serde::{Serialize, Serializer};

/// Of the longest IPv4 address with a port, bytes.
const LONGEST: usize = "255.255.255.255:65535".len();

/// Writes an address as serde does.
pub(super) fn serialize<S: Serializer>(
    address: &SocketAddr,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match address {
        SocketAddr::V4(v4) => {
            let mut digits = itoa::Buffer::new();
            let mut text = ArrayString::<LONGEST>::new();
            for (octet, end) in v4.ip().octets().into_iter().zip(['.', '.', '.', ':']) {
                text.push_str(digits.format(octet));
                text.push(end);
            }
            text.push_str(digits.format(v4.port()));
            serializer.serialize_str(&text)
        }
        SocketAddr::V6(_) => address.serialize(serializer),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_as_everywhere_else() {
        for text in [
            "0.0.0.0:0",
            "192.0.2.1:10000",
            "255.255.255.255:65535",
            "[2001:db8::1]:5004",
        ] {
            let address: SocketAddr = text.parse().expect(text);
            let mut json = Vec::new();
            serialize(&address, &mut serde_json::Serializer::new(&mut json)).expect(text);
            assert_eq!(json, format!("\"{text}\"").into_bytes());
        }
    }
}
