//! The encrypted overlay: what the kernel's wireguard devices should have, what they have, and the steps between the two.
//!
//! Wire and lease data are upstream's (upstream: pkg/backend/wireguard), so that its nodes and ours are peers of each other. The
//! kernel computes the public key from the private one, so nothing here does any cryptography.

mod desired;
mod observed;
mod op;
mod plan;
pub mod wire;

pub use desired::{Desired, Peer, Place, Tunnel, desired, over};
pub use observed::{Device, Inner, Observed, SeenPeer};
pub use op::Op;
pub use plan::{Plan, plan};

use crate::key::{LEN, SecretKey};

/// How old a handshake may be for its session to be of use, in seconds (`REJECT_AFTER_TIME` of the protocol).
pub const SESSION_SECONDS: u64 = 180;

/// The private key as the kernel keeps it: the bits that the curve ignores or demands are set as it wants them.
#[must_use]
pub fn clamped(key: &SecretKey) -> SecretKey {
    let mut bytes = *key.bytes();
    let [first, .., last] = &mut bytes;
    *first &= 0xf8;
    *last = *last & 0x7f | 0x40;
    SecretKey::new(bytes)
}

/// A new private key out of random bytes.
#[must_use]
pub fn private_from_random(bytes: [u8; LEN]) -> SecretKey {
    clamped(&SecretKey::new(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_key_is_clamped_once() {
        let key = private_from_random([0xff; LEN]);
        assert_eq!(key.bytes()[0], 0xf8);
        assert_eq!(key.bytes()[31], 0x7f);
        assert_eq!(clamped(&key), key);
        assert_eq!(private_from_random([0; LEN]).bytes()[31], 0x40);
    }
}
