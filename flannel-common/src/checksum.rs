//! The Internet checksum (RFC 1071) in the pieces that the data path needs.

/// Adds `bytes` to a one's complement sum of big-endian 16-bit words. An odd last byte counts as if a zero
/// followed it.
#[inline(always)]
pub const fn sum(bytes: &[u8], start: u32) -> u32 {
    let mut total = start;
    let mut at = 0;
    while at + 1 < bytes.len() {
        total += ((bytes[at] as u32) << 8) | bytes[at + 1] as u32;
        at += 2;
    }
    if at < bytes.len() {
        total += (bytes[at] as u32) << 8;
    }
    total
}

/// Folds a sum of less than 2^32 words of 32 bits, each as it lies in memory, to what [`sum`] and [`fold`] make of the same bytes: in one's
/// complement neither the width nor the order of the bytes matters before the last step (RFC 1071, section 2).
#[inline(always)]
pub const fn fold_words(sum: u64) -> u16 {
    let halves = (sum & 0xffff_ffff) + (sum >> 32);
    let quarters = (halves & 0xffff) + (halves >> 16 & 0xffff) + (halves >> 32);
    fold(quarters as u32).to_be()
}

/// Folds a sum of at most 65536 words to 16 bits.
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    let twice = (once & 0xffff) + (once >> 16);
    // The second fold leaves no carry: `once` is at most 0x1fffe.
    (twice & 0xffff) as u16
}

/// The checksum field for a header whose words, checksum field zero, sum to `sum`.
#[inline(always)]
pub const fn finish(sum: u32) -> u16 {
    !fold(sum)
}

/// The checksum after one 16-bit word of the covered data changed from `old` to `new` (RFC 1624, equation 3).
#[inline(always)]
pub const fn replace(check: u16, old: u16, new: u16) -> u16 {
    !fold((!check) as u32 + (!old) as u32 + new as u32)
}

/// Whether a 20-byte IPv4 header carries a right checksum.
#[inline(always)]
pub const fn ipv4_header_is_valid(header: &[u8; 20]) -> bool {
    fold(sum(header, 0)) == 0xffff
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // The worked example of RFC 1071, section 3.
    #[test]
    fn rfc_1071_example() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(fold(sum(&bytes, 0)), 0xddf2);
    }

    #[test]
    fn odd_length_pads_with_zero() {
        assert_eq!(
            sum(&[0x12, 0x34, 0x56], 0),
            sum(&[0x12, 0x34, 0x56, 0x00], 0)
        );
    }

    proptest! {
        #[test]
        fn words_of_any_width_and_order_have_one_sum(words in proptest::collection::vec(any::<u32>(), 1..40)) {
            let bytes: std::vec::Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let wide = fold_words(words.iter().map(|word| u64::from(*word)).sum());
            prop_assert_eq!(wide, fold(sum(&bytes, 0)));
        }

        #[test]
        fn replacing_a_word_equals_summing_again(mut header in any::<[u8; 20]>(), word in 0usize..10, new in any::<u16>()) {
            prop_assume!(word != 5);
            header[10] = 0;
            header[11] = 0;
            let check = finish(sum(&header, 0));
            let old = u16::from_be_bytes([header[word * 2], header[word * 2 + 1]]);
            header[word * 2..word * 2 + 2].copy_from_slice(&new.to_be_bytes());
            let again = finish(sum(&header, 0));
            let replaced = replace(check, old, new);
            // 0x0000 and 0xffff are the two spellings of zero in one's complement.
            prop_assert!(replaced == again || (replaced ^ again) == 0xffff);
            header[10..12].copy_from_slice(&replaced.to_be_bytes());
            prop_assert!(ipv4_header_is_valid(&header) || sum(&header, 0) == 0);
        }
    }
}
