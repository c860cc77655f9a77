//! The classic pcap file, as `tcpdump -w` writes it.

use anyhow::{Context as _, bail, ensure};
use std::time::Duration;

const FILE_HEADER: usize = 24;
const RECORD_HEADER: usize = 16;
const LINK_ETHERNET: u32 = 1;

/// A captured frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Time of capture since the Unix epoch.
    pub ts: Duration,
    /// From the destination MAC on.
    pub data: Vec<u8>,
    /// Length on the wire in bytes; more than `data` holds if the capture cut it.
    pub wire_len: u32,
}

/// Reads a whole file of Ethernet frames, of either byte order, with micro- or nanoseconds.
pub fn parse(file: &[u8]) -> anyhow::Result<Vec<Packet>> {
    let magic = word(file, 0, false)?;
    let (big, nanos) = match magic {
        0xa1b2_c3d4 => (false, false),
        0xa1b2_3c4d => (false, true),
        0xd4c3_b2a1 => (true, false),
        0x4d3c_b2a1 => (true, true),
        _ => bail!("magic {magic:#x} is not that of a pcap file"),
    };
    let link = word(file, 20, big)?;
    ensure!(link == LINK_ETHERNET, "link type {link}, not Ethernet");
    let mut at = FILE_HEADER;
    let mut packets = Vec::new();
    while at < file.len() {
        let fraction = word(file, at + 4, big)?;
        let len = usize::try_from(word(file, at + 8, big)?)?;
        let data = file
            .get(at + RECORD_HEADER..at + RECORD_HEADER + len)
            .with_context(|| format!("pcap file of {} bytes ends within a packet", file.len()))?;
        let fraction = if nanos {
            Duration::from_nanos(fraction.into())
        } else {
            Duration::from_micros(fraction.into())
        };
        packets.push(Packet {
            ts: Duration::from_secs(word(file, at, big)?.into()) + fraction,
            data: data.to_vec(),
            wire_len: word(file, at + 12, big)?,
        });
        at += RECORD_HEADER + len;
    }
    Ok(packets)
}

fn word(file: &[u8], at: usize, big: bool) -> anyhow::Result<u32> {
    let bytes = file
        .get(at..at + 4)
        .with_context(|| format!("pcap file of {} bytes ends at {at}", file.len()))?;
    let bytes: [u8; 4] = bytes.try_into()?;
    Ok(if big {
        u32::from_be_bytes(bytes)
    } else {
        u32::from_le_bytes(bytes)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_byte_orders_and_resolutions_are_read() {
        for (magic, fraction) in [(0xa1b2_c3d4_u32, 5_000_u32), (0xa1b2_3c4d, 5_000_000)] {
            let words = [magic, 0, 0, 0, 65_535, 1, 7, fraction, 2, 60];
            let little = words.iter().flat_map(|word| word.to_le_bytes());
            let big = words.iter().flat_map(|word| word.to_be_bytes());
            for mut file in [little.collect::<Vec<u8>>(), big.collect()] {
                assert!(parse(&file).is_err());
                file.extend([1, 2]);
                let packets = parse(&file).unwrap();
                assert_eq!(packets.len(), 1);
                assert_eq!(packets[0].ts, Duration::from_millis(7_005));
                assert_eq!(
                    (packets[0].wire_len, &packets[0].data[..]),
                    (60, &[1, 2][..])
                );
                assert!(parse(&file[..30]).is_err());
            }
        }
        assert!(parse(b"").is_err());
        assert!(parse(&[0; 24]).is_err());
    }
}
