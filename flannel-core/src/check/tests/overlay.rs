//! The tunnel device, its peers, the pods' bridge, and the port.

use super::*;

#[test]
fn the_subnet_file() {
    use Status::{Fail, Skip};
    let text = |text: &'static str| {
        move |seen: &mut Observations| {
            seen.overlay.subnet_file = Some(SubnetFile::parse(
                "/run/flannel/subnet.env",
                text,
                Family::V4,
            ));
            seen.overlay.bridge = None;
        }
    };
    assert_only(
        "subnet-file",
        Fail,
        &["lacks FLANNEL_NETWORK", "delete /run/flannel/subnet.env"],
        text("nonsense"),
    );
    assert_only(
        "subnet-file",
        Fail,
        &["says network 10.9.0.0/16", "says 10.244.0.0/16"],
        text("FLANNEL_NETWORK=10.9.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\n"),
    );
    assert_only(
        "subnet-file",
        Fail,
        &["does not exist: pods cannot be made"],
        |seen| {
            seen.overlay.subnet_file = None;
        },
    );
    assert_only("subnet-file", Skip, &[], |seen| {
        seen.overlay.subnet_file = None;
        seen.agent = Agent::default();
    });
    // As a shell reads it: quotes, and the last one counts.
    let file = SubnetFile::parse(
        "x",
        "FLANNEL_MTU=1\nFLANNEL_MTU='1400'\nFLANNEL_SUBNET=\"10.1.2.1/24\"\n",
        Family::V4,
    );
    assert_eq!(
        (file.mtu, file.subnet),
        (Some(1400), Some(net("10.1.2.0/24").into()))
    );
}

#[test]
fn the_device() {
    use Status::{Fail, Ok, Skip, Warn};
    assert_only(
        "device",
        Fail,
        &["does not exist", "start the agent"],
        |seen| {
            seen.overlay.device = None;
            seen.sockets.udp.clear();
        },
    );
    assert_only("device", Skip, &[], |seen| {
        seen.overlay.device = None;
        seen.sockets.udp.clear();
        seen.agent = Agent::default();
    });
    assert_only(
        "device",
        Fail,
        &["is down", "ip link set flannel.1 up"],
        |seen| {
            device(seen).up = false;
            seen.sockets.udp.clear();
        },
    );
    let other_port = |seen: &mut Observations| {
        if let ObservedKind::Vxlan { port, .. } = &mut device(seen).kind {
            *port = 4789;
        }
        seen.sockets.udp.clear();
    };
    assert_only("device", Fail, &["port is 4789, not 8472"], other_port);
    assert_only("device", Warn, &["left over"], |seen| {
        other_port(seen);
        seen.agent = Agent::default();
    });
    assert_only("device", Fail, &["add address 10.244.1.0/32"], |seen| {
        device(seen).addresses.clear();
    });
    assert_only("device", Fail, &["remove address 10.244.8.0/32"], |seen| {
        device(seen).addresses.insert(net("10.244.8.0/32").into());
    });
    assert_only(
        "device",
        Warn,
        &["169.254.1.2/16", "denyinterfaces flannel*"],
        |seen| {
            device(seen).addresses.insert(net("169.254.1.2/16").into());
        },
    );
    assert_only("device", Ok, &[], |seen| {
        device(seen).addresses.insert(net("192.0.2.1/24").into());
    });
    assert_only(
        "device",
        Fail,
        &["bridge", "ip link del flannel.1"],
        |seen| {
            device(seen).kind = ObservedKind::Other("bridge".into());
            seen.sockets.udp.clear();
        },
    );
}

#[test]
fn entries_of_peers() {
    use Status::{Fail, Warn};
    let missing: [(&str, Change); 4] = [
        ("set route 10.244.2.0/24", |device| device.routes.clear()),
        ("set neighbour 10.244.2.0", |device| {
            device.neighbours.clear();
        }),
        ("set forwarding entry 02:00:00:00:00:02", |device| {
            device.fdb.clear();
        }),
        ("dst 192.168.77.12", |device| {
            device
                .fdb
                .insert(PEER_MAC.into(), Ipv4Addr::new(192, 168, 77, 99).into());
        }),
    ];
    for (word, change) in missing {
        assert_only("peer-entries", Fail, &[word, "within seconds"], |seen| {
            change(device(seen));
        });
    }
    let stale: [(&str, Change); 2] = [
        ("delete neighbour 10.244.9.0", |device| {
            device
                .neighbours
                .insert(Ipv4Addr::new(10, 244, 9, 0).into(), PEER_MAC.into());
        }),
        ("delete forwarding entry 02:00:00:00:00:09", |device| {
            device.fdb.insert([2, 0, 0, 0, 0, 9].into(), PEER);
        }),
    ];
    for (word, change) in stale {
        assert_only("peer-entries", Warn, &[word, "left over"], |seen| {
            change(device(seen));
        });
    }
    assert_only(
        "peer-entries",
        Warn,
        &["192.168.77.12", "correct the leases"],
        |seen| {
            let key = SubnetKey::from_v4(net("10.244.2.0/24"));
            let attrs = own_lease(seen).get_mut(&key).expect("the peer's lease");
            // The same MAC address as ours.
            *attrs = LeaseAttrs::vxlan_v4(PEER_V4, 1, OWN_MAC.into());
            device(seen).fdb = [(OWN_MAC.into(), PEER)].into();
            let base = Ipv4Addr::new(10, 244, 2, 0);
            device(seen).neighbours = [(base.into(), OWN_MAC.into())].into();
        },
    );
}

#[test]
fn the_bridge() {
    use Status::{Fail, Ok, Skip};
    assert_only(
        "bridge",
        Fail,
        &["10.244.7.1/24", "ip link del cni0"],
        |seen| {
            seen.overlay.bridge.as_mut().expect("a bridge").addresses =
                vec![net("10.244.7.1/24").into()];
        },
    );
    assert_only("bridge", Ok, &["no address yet"], |seen| {
        seen.overlay
            .bridge
            .as_mut()
            .expect("a bridge")
            .addresses
            .clear();
    });
    assert_only("bridge", Ok, &["first pod"], |seen| {
        seen.overlay.bridge = None;
    });
    assert_only("bridge", Skip, &[], |seen| {
        seen.overlay.subnet_file = None;
        seen.agent = Agent::default();
    });
}

#[test]
fn sizes() {
    use Status::{Fail, Ok, Warn};
    assert_only("mtu", Fail, &["flannel.1 has 1500", "restart"], |seen| {
        device(seen).mtu = 1500;
        probe(seen).passes = Some(1500);
    });
    assert_only(
        "mtu",
        Fail,
        &["FLANNEL_MTU in /run/flannel/subnet.env is 1400"],
        |seen| {
            seen.overlay.subnet_file.as_mut().expect("a file").mtu = Some(1400);
        },
    );
    assert_only("mtu", Warn, &["veth1 1500", "restart the pods"], |seen| {
        let bridge = seen.overlay.bridge.as_mut().expect("a bridge");
        bridge.ports.insert("veth1".into(), 1500);
    });
    assert_only("mtu", Ok, &[], |seen| {
        let bridge = seen.overlay.bridge.as_mut().expect("a bridge");
        bridge.ports.insert("veth1".into(), 1300);
    });
    assert_only(
        "mtu",
        Warn,
        &["192.168.77.12 1400", "\"MTU\":1400"],
        |seen| {
            seen.overlay.paths.insert(PEER, 1400);
        },
    );
    assert_only("mtu", Fail, &["Backend.MTU"], |seen| {
        conf(
            seen,
            r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#,
        );
        uplink(seen).chosen.mtu = 100;
    });
}

#[test]
fn checksums() {
    use Status::{Ok, Skip};
    assert_only(
        "offload",
        Ok,
        &["ethtool -K flannel.1 tx-checksum-ip-generic off"],
        |_| {},
    );
    assert_only("offload", Ok, &["computes checksums itself"], |seen| {
        seen.overlay.offload = Offload::Off;
    });
    assert_only("offload", Skip, &[], |seen| {
        seen.overlay.offload = Offload::Unknown;
    });
}

#[test]
fn the_port() {
    use Status::{Fail, Ok};
    let process = |pid| Owner::Process {
        pid,
        name: "nginx".into(),
    };
    assert_only("port", Fail, &["nginx, pid 7", "another Port"], |seen| {
        seen.sockets.udp[0].owner = process(7);
    });
    assert_only("port", Fail, &["without a socket", "dmesg"], |seen| {
        seen.sockets.udp.clear();
    });
    assert_only("port", Ok, &[], |seen| {
        seen.sockets.udp[0].owner = process(42);
    });
    let stranger = |vni| OtherVxlan {
        name: "vxlan.calico".into(),
        vni,
        port: 8472,
        external: false,
    };
    assert_only(
        "port",
        Fail,
        &["vxlan.calico", "VNI 1", "ip link del vxlan.calico"],
        |seen| {
            seen.sockets.vxlan.push(stranger(1));
        },
    );
    assert_only("port", Ok, &["vxlan.calico with another VNI"], |seen| {
        seen.sockets.vxlan.push(stranger(4096));
    });
    assert_only("port", Fail, &["cilium_vxlan", "for all VNIs"], |seen| {
        seen.sockets.vxlan.push(OtherVxlan {
            name: "cilium_vxlan".into(),
            external: true,
            ..stranger(0)
        });
    });
    let never = |seen: &mut Observations| {
        seen.overlay.device = None;
        seen.agent = Agent::default();
    };
    assert_only("port", Fail, &["cannot be seen"], never);
    assert_only("port", Ok, &["shared with vxlan.calico"], |seen| {
        never(seen);
        seen.sockets.vxlan.push(stranger(4096));
    });
    assert_only("port", Ok, &["free"], |seen| {
        never(seen);
        seen.sockets.udp.clear();
    });
}
