//! WireGuard keys as text: 32 bytes in base64, as `wg` prints them and leases carry them.
//!
//! A key that may be shown and one that may not are different types, so that a secret cannot end up in a log line by oversight.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Bytes of every key.
pub const LEN: usize = 32;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// What a text was refused for. The text itself is not told: it may be a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("not a WireGuard key: write 32 bytes in base64, which are 43 characters and a \"=\"")]
pub struct KeyError;

/// The public key of a node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; LEN]);

impl PublicKey {
    /// Takes the bytes as they are.
    pub const fn new(bytes: [u8; LEN]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    pub const fn bytes(&self) -> &[u8; LEN] {
        &self.0
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&encode(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode(text).map(Self)
    }
}

/// A private key, or one that is shared by all nodes. Never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretKey([u8; LEN]);

impl SecretKey {
    /// Takes the bytes as they are.
    pub const fn new(bytes: [u8; LEN]) -> Self {
        Self(bytes)
    }

    /// The bytes, for the kernel.
    pub const fn bytes(&self) -> &[u8; LEN] {
        &self.0
    }

    /// The text, for the file it is kept in.
    pub fn to_base64(&self) -> String {
        encode(&self.0)
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(…)")
    }
}

impl FromStr for SecretKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        decode(text).map(Self)
    }
}

fn encode(bytes: &[u8; LEN]) -> String {
    let mut text = String::with_capacity(44);
    for chunk in bytes.chunks(3) {
        let mut three = [0; 3];
        three
            .iter_mut()
            .zip(chunk)
            .for_each(|(to, from)| *to = *from);
        let [a, b, c] = three.map(u32::from);
        let number = a << 16 | b << 8 | c;
        for place in 0..=chunk.len() {
            let shift = 18 - 6 * place;
            let digit = usize::try_from(number >> shift & 0x3f).unwrap_or_default();
            text.extend(ALPHABET.get(digit).map(|byte| char::from(*byte)));
        }
    }
    text.push('=');
    text
}

/// Line ends are passed over, as Go's decoder does: the file of a private key has one.
fn decode(text: &str) -> Result<[u8; LEN], KeyError> {
    let mut bytes = Vec::with_capacity(LEN + 1);
    let (mut number, mut bits) = (0u32, 0u32);
    let mut digits = 0usize;
    let body: String = text.chars().filter(|c| !matches!(c, '\r' | '\n')).collect();
    let body = body.strip_suffix('=').ok_or(KeyError)?;
    for byte in body.bytes() {
        let digit = ALPHABET.iter().position(|known| *known == byte);
        let digit = digit
            .and_then(|digit| u32::try_from(digit).ok())
            .ok_or(KeyError)?;
        number = number << 6 | digit;
        bits += 6;
        digits += 1;
        if bits >= 8 {
            bits -= 8;
            bytes.extend(u8::try_from(number >> bits));
            number &= (1 << bits) - 1;
        }
    }
    if digits != 43 {
        return Err(KeyError);
    }
    bytes.try_into().map_err(|_length| KeyError)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `wg genkey` and `wg pubkey` print these (base64 by coreutils).
    #[test]
    fn the_text_is_base64() {
        for (bytes, text) in [
            ([0; 32], "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="),
            ([0xff; 32], "//////////////////////////////////////////8="),
            (
                std::array::from_fn(|at| u8::try_from(at * 7 + 3).unwrap()),
                "AwoRGB8mLTQ7QklQV15lbHN6gYiPlp2kq7K5wMfO1dw=",
            ),
        ] {
            assert_eq!(PublicKey::new(bytes).to_string(), text);
            assert_eq!(text.parse(), Ok(PublicKey::new(bytes)));
            assert_eq!(format!("{text}\n").parse(), Ok(SecretKey::new(bytes)));
        }
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let good = "AwoRGB8mLTQ7QklQV15lbHN6gYiPlp2kq7K5wMfO1dw=";
        let short = &good[4..];
        let long = format!("AAAA{good}");
        let url = good.replace('w', "_");
        let unpadded = good.trim_end_matches('=');
        for text in [
            "",
            "=",
            short,
            &long,
            &url,
            unpadded,
            &format!("{good}="),
            &format!(" {good}"),
        ] {
            assert_eq!(text.parse::<PublicKey>(), Err(KeyError), "{text}");
        }
    }

    #[test]
    fn a_secret_is_not_printed() {
        let secret = SecretKey::new([7; 32]);
        assert_eq!(format!("{secret:?}"), "SecretKey(…)");
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(bytes: [u8; 32]) {
            prop_assert_eq!(PublicKey::new(bytes).to_string().parse(), Ok(PublicKey::new(bytes)));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,60}") {
            let _key = text.parse::<SecretKey>();
        }
    }
}
