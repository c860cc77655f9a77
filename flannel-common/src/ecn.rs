//! Explicit congestion notification through the tunnel, as the kernel does it (RFC 6040, normal mode;
//! `INET_ECN_encapsulate` and `INET_ECN_decapsulate` in `include/net/inet_ecn.h`).

/// The two ECN bits of the TOS byte.
pub const MASK: u8 = 0b11;
/// Not ECN-capable transport.
pub const NOT_ECT: u8 = 0b00;
/// ECN-capable transport, codepoint 0.
pub const ECT_0: u8 = 0b10;
/// Congestion experienced.
pub const CE: u8 = 0b11;

/// The ECN bits of the outer header for an inner TOS byte. DSCP is not copied: flannel's device has `tos 0`.
#[inline(always)]
pub const fn outer_for(inner_tos: u8) -> u8 {
    let inner = inner_tos & MASK;
    if inner == CE { ECT_0 } else { inner }
}

/// What decapsulation does to the inner packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decap {
    /// Leave the inner header as it is.
    Keep,
    /// Set the inner ECN bits to [`CE`].
    SetCe,
    /// Congestion was marked on a packet that cannot say so: drop it.
    Drop,
}

/// Decides what becomes of the inner packet, given both TOS bytes.
#[inline(always)]
pub const fn decap(outer_tos: u8, inner_tos: u8) -> Decap {
    if outer_tos & MASK != CE {
        return Decap::Keep;
    }
    match inner_tos & MASK {
        NOT_ECT => Decap::Drop,
        CE => Decap::Keep,
        _ => Decap::SetCe,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // RFC 6040, figure 3 (normal mode) and figure 4 as Linux implements it: every combination.
    #[test]
    fn encapsulation_table() {
        let rows = [(0b00, 0b00), (0b01, 0b01), (0b10, 0b10), (0b11, 0b10)];
        for (inner, outer) in rows {
            assert_eq!(outer_for(inner), outer, "inner {inner:02b}");
            assert_eq!(outer_for(inner | 0xb8), outer, "DSCP must not be copied");
        }
    }

    #[test]
    fn decapsulation_table() {
        for outer in [0b00, 0b01, 0b10] {
            for inner in 0b00..=0b11 {
                assert_eq!(decap(outer, inner), Decap::Keep);
            }
        }
        assert_eq!(decap(CE, 0b00), Decap::Drop);
        assert_eq!(decap(CE, 0b01), Decap::SetCe);
        assert_eq!(decap(CE, 0b10), Decap::SetCe);
        assert_eq!(decap(CE, 0b11), Decap::Keep);
    }
}
