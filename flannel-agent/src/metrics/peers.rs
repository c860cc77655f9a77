//! Figures of each peer of the encrypted overlay, from the kernel's devices at the moment of a scrape.

use std::fmt;

use flannel_core::{
    key::PublicKey,
    wireguard::{Inner, SeenPeer},
};
use prometheus_client::{encoding::DescriptorEncoder, metrics::MetricType};

use super::node::{count, named};
use crate::{state::Bare, wireguard};

/// A device and its peers.
pub(super) type Device = (String, Inner);

/// The devices that the agent keeps. One that is gone for the moment has no figures.
pub(super) fn read(state: &Bare) -> Vec<Device> {
    let mut found = Vec::new();
    for name in &state.devices {
        match wireguard::read(name) {
            Ok(inner) => found.push((name.clone(), inner)),
            Err(error) => tracing::debug!(%error, "read the peers of {name}"),
        }
    }
    found
}

pub(super) fn encode(to: &mut DescriptorEncoder<'_>, devices: &[Device]) -> fmt::Result {
    // A family without series is not told at all.
    if devices.iter().all(|(_, inner)| inner.peers.is_empty()) {
        return Ok(());
    }
    let name = named("peer_bytes");
    let help = "Bytes of encrypted packets that WireGuard has sent to a peer and received from it";
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Counter)?;
    for series in all(devices) {
        let figures = [
            ("received", series.peer.received),
            ("sent", series.peer.sent),
        ];
        for (direction, bytes) in figures {
            let labels = series.labels(Some(("direction", direction)));
            count(&mut family, &labels, bytes)?;
        }
    }
    let name = named("peer_last_handshake_timestamp_seconds");
    let help = "When WireGuard's last handshake with a peer was; 0 for never";
    let mut family = to.encode_descriptor(&name, help, None, MetricType::Gauge)?;
    for series in all(devices) {
        family
            .encode_family(&series.labels(None))?
            .encode_gauge(&series.peer.handshake)?;
    }
    Ok(())
}

/// A peer, and what its series are told apart by.
struct Series<'a> {
    device: &'a str,
    /// Its first subnet, by which people know it.
    subnet: String,
    public_key: String,
    peer: &'a SeenPeer,
}

impl<'a> Series<'a> {
    fn new(device: &'a str, key: &PublicKey, peer: &'a SeenPeer) -> Self {
        let subnet = peer.allowed.first();
        Self {
            device,
            subnet: subnet.map_or_else(String::new, ToString::to_string),
            public_key: key.to_string(),
            peer,
        }
    }

    fn labels<'b>(&'b self, more: Option<(&'b str, &'b str)>) -> Vec<(&'b str, &'b str)> {
        let own = [
            ("device", self.device),
            ("peer", self.subnet.as_str()),
            ("public_key", self.public_key.as_str()),
        ];
        own.into_iter().chain(more).collect()
    }
}

fn all(devices: &[Device]) -> impl Iterator<Item = Series<'_>> {
    devices.iter().flat_map(|(device, inner)| {
        let peers = inner.peers.iter();
        peers.map(move |(key, peer)| Series::new(device, key, peer))
    })
}

#[cfg(test)]
mod tests {
    use flannel_core::wireguard::wire;
    use prometheus_client::{collector::Collector, encoding::text, registry::Registry};

    use super::*;

    #[derive(Debug)]
    struct Of(Vec<Device>);

    impl Collector for Of {
        fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
            super::encode(&mut encoder, &self.0)
        }
    }

    fn told(devices: Vec<Device>) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Of(devices)));
        let mut body = String::new();
        text::encode(&mut body, &registry).unwrap();
        body
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(value.len()).unwrap() + 4;
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    /// What the kernel answers, by the numbers of `include/uapi/linux/wireguard.h`.
    fn device(peers: &[(u8, [u8; 4], i64, u64, u64)]) -> Inner {
        let peers = peers
            .iter()
            .map(|(key, subnet, handshake, received, sent)| {
                let net = [
                    attribute(1, &2u16.to_ne_bytes()),
                    attribute(2, subnet),
                    attribute(3, &[24]),
                ];
                let timespec = [handshake.to_ne_bytes(), 5i64.to_ne_bytes()].concat();
                let peer = [
                    attribute(1, &[*key; 32]),
                    attribute(6, &timespec),
                    attribute(7, &received.to_ne_bytes()),
                    attribute(8, &sent.to_ne_bytes()),
                    attribute(9 | 1 << 15, &attribute(1 << 15, &net.concat())),
                ];
                attribute(1 << 15, &peer.concat())
            });
        let part = attribute(8 | 1 << 15, &peers.collect::<Vec<_>>().concat());
        let mut inner = Inner::default();
        wire::read_device(&mut inner, &part, 0).unwrap();
        inner
    }

    #[test]
    fn every_peer_of_every_device_has_its_figures() {
        let first = device(&[
            (7, [10, 244, 1, 0], 1_800_000_000, 1 << 40, 92),
            (8, [10, 244, 2, 0], 0, 0, 148),
        ]);
        let second = device(&[(7, [10, 245, 1, 0], 1_800_000_001, 1, 2)]);
        let body = told(vec![
            ("flannel-wg".into(), first),
            ("flannel-wg-v6".into(), second),
        ]);
        let seven = PublicKey::new([7; 32]);
        let eight = PublicKey::new([8; 32]);
        let wanted = format!(
            "# HELP flannel_peer_bytes Bytes of encrypted packets that WireGuard has sent to a peer and received from it\n\
             # TYPE flannel_peer_bytes counter\n\
             flannel_peer_bytes_total{{device=\"flannel-wg\",peer=\"10.244.1.0/24\",public_key=\"{seven}\",direction=\"received\"}} 1099511627776\n\
             flannel_peer_bytes_total{{device=\"flannel-wg\",peer=\"10.244.1.0/24\",public_key=\"{seven}\",direction=\"sent\"}} 92\n\
             flannel_peer_bytes_total{{device=\"flannel-wg\",peer=\"10.244.2.0/24\",public_key=\"{eight}\",direction=\"received\"}} 0\n\
             flannel_peer_bytes_total{{device=\"flannel-wg\",peer=\"10.244.2.0/24\",public_key=\"{eight}\",direction=\"sent\"}} 148\n\
             flannel_peer_bytes_total{{device=\"flannel-wg-v6\",peer=\"10.245.1.0/24\",public_key=\"{seven}\",direction=\"received\"}} 1\n\
             flannel_peer_bytes_total{{device=\"flannel-wg-v6\",peer=\"10.245.1.0/24\",public_key=\"{seven}\",direction=\"sent\"}} 2\n\
             # HELP flannel_peer_last_handshake_timestamp_seconds When WireGuard's last handshake with a peer was; 0 for never\n\
             # TYPE flannel_peer_last_handshake_timestamp_seconds gauge\n\
             flannel_peer_last_handshake_timestamp_seconds{{device=\"flannel-wg\",peer=\"10.244.1.0/24\",public_key=\"{seven}\"}} 1800000000\n\
             flannel_peer_last_handshake_timestamp_seconds{{device=\"flannel-wg\",peer=\"10.244.2.0/24\",public_key=\"{eight}\"}} 0\n\
             flannel_peer_last_handshake_timestamp_seconds{{device=\"flannel-wg-v6\",peer=\"10.245.1.0/24\",public_key=\"{seven}\"}} 1800000001\n\
             # EOF\n"
        );
        assert_eq!(body, wanted);
    }

    #[test]
    fn a_node_without_peers_has_no_series() {
        let none = vec![("flannel-wg".to_owned(), Inner::default())];
        assert_eq!(told(none), "# EOF\n");
        assert_eq!(told(Vec::new()), "# EOF\n");
    }
}
