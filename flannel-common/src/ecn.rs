//! Explicit congestion notification through the tunnel, as the kernel does it (RFC 6040, normal mode;
//! `INET_ECN_encapsulate` and `INET_ECN_decapsulate` in `include/net/inet_ecn.h`).

/// The two ECN bits of the TOS byte.
pub const MASK: u8 = 0b11;
/// Not ECN-capable transport.
pub const NOT_ECT: u8 = 0b00;
/// ECN-capable transport, codepoint 0.
pub const ECT_0: u8 = 0b10;
/// ECN-capable transport, codepoint 1.
pub const ECT_1: u8 = 0b01;
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
    /// Set the inner ECN bits to [`ECT_1`] (Linux since 5.7).
    SetEct1,
    /// Congestion was marked on a packet that cannot say so: drop it.
    Drop,
}

/// Decides what becomes of the inner packet, given both TOS bytes.
#[inline(always)]
pub const fn decap(outer_tos: u8, inner_tos: u8) -> Decap {
    match (inner_tos & MASK, outer_tos & MASK) {
        (NOT_ECT, CE) => Decap::Drop,
        (ECT_0 | ECT_1, CE) => Decap::SetCe,
        (ECT_0, ECT_1) => Decap::SetEct1,
        _ => Decap::Keep,
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
        use Decap::{Drop, Keep, SetCe, SetEct1};
        let table = [
            (NOT_ECT, [Keep, Keep, Keep, Drop]),
            (ECT_1, [Keep, Keep, Keep, SetCe]),
            (ECT_0, [Keep, SetEct1, Keep, SetCe]),
            (CE, [Keep, Keep, Keep, Keep]),
        ];
        for (inner, row) in table {
            for (outer, want) in (0..4).zip(row) {
                assert_eq!(decap(outer, inner), want, "{inner:02b} in {outer:02b}");
                assert_eq!(
                    decap(outer | 0xb8, inner | 0xb8),
                    want,
                    "DSCP must not matter"
                );
            }
        }
    }
}
