use std::ffi::OsString;

use clap::CommandFactory as _;

use super::*;

fn parse(args: &[&str]) -> Result<Args, clap::Error> {
    let args = std::iter::once(&"flannel-agent").chain(args);
    Args::read(args.map(OsString::from))
}

#[test]
fn definition_is_sound() {
    Args::command().debug_assert();
}

#[test]
fn go_spelling_is_read() {
    let args =
        parse(&["-iface=eth1", "-iface", "eth2", "-etcd-prefix=/net", "-v=2"]).expect("parse");
    assert_eq!(args.uplink.iface, ["eth1", "eth2"]);
    assert_eq!(args.etcd.etcd_prefix, "/net");
    assert_eq!(args.verbosity, 2);
}

#[test]
fn short_flags_survive() {
    assert_eq!(parse(&["-v", "1"]).expect("parse").verbosity, 1);
    assert_eq!(parse(&["-v1"]).expect("parse").verbosity, 1);
    let args = parse(&["status", "-o", "json"]).expect("parse");
    assert!(matches!(
        args.command,
        Some(Command::Status {
            output: Output::Json,
            features: false,
        })
    ));
}

#[test]
fn a_password_is_taken_as_it_is() {
    for args in [
        &["--etcd-password", "-iface=x"][..],
        &["-etcd-password", "-iface=x"],
        &["-etcd-password=-iface=x"],
    ] {
        let args = parse(args).expect("parse");
        assert_eq!(args.etcd.etcd_password.as_deref(), Some("-iface=x"));
        assert!(args.uplink.iface.is_empty());
    }
}

#[test]
fn the_last_of_a_repeated_flag_counts() {
    let args = parse(&["-etcd-prefix=/a", "--v=1", "-etcd-prefix=/b", "-v", "-3"]);
    let args = args.expect("parse");
    assert_eq!((args.etcd.etcd_prefix.as_str(), args.verbosity), ("/b", 0));
    let args = parse(&[
        "-etcd-endpoints=http://a:1",
        "-etcd-endpoints",
        "http://b:1,http://c:1",
    ]);
    assert_eq!(
        args.expect("parse").etcd.etcd_endpoints,
        ["http://b:1", "http://c:1"]
    );
    assert_eq!(parse(&["-v=1000"]).expect("parse").verbosity, u8::MAX);
}

#[test]
fn unknown_flags_and_bad_values_are_errors() {
    for bad in [
        &["--no-such-flag"][..],
        &["--public-ip=10.0.0"],
        &["--datapath=fast"],
        &["--bpf-fast-path=on"],
        &["--bpf-fast-path=SYN"],
        &["--bpf-flow-entries=1023"],
        &["--bpf-flow-entries=16777217"],
        &["--bpf-flow-entries=many"],
        &["--subnet-lease-renew-margin=0"],
        &["--subnet-lease-renew-margin=1440"],
        &["-v=much"],
        &["cleanup", "--vni=16777216"],
        &["foo"],
    ] {
        assert!(parse(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn the_flag_beats_the_network_configuration() {
    let given = parse(&["-bpf-fast-path=off"]).expect("parse");
    assert_eq!(given.fast_path(Some(Choice::Syn)), Choice::Off);
    let absent = parse(&[]).expect("parse");
    assert_eq!(absent.fast_path(Some(Choice::Syn)), Choice::Syn);
    assert_eq!(absent.fast_path(None), Choice::Auto);
    let auto = parse(&["--bpf-fast-path=auto"]).expect("parse");
    assert_eq!(auto.fast_path(Some(Choice::Off)), Choice::Auto);
}

#[test]
fn the_size_of_the_flow_table_has_bounds() {
    assert_eq!(parse(&[]).expect("parse").bpf_flow_entries, 262_144);
    for entries in ["1024", "16777216"] {
        let args = parse(&["--bpf-flow-entries", entries]).expect("parse");
        assert_eq!(args.bpf_flow_entries.to_string(), entries);
    }
}

#[test]
fn directory_beats_etcd() {
    assert!(matches!(
        parse(&["--lease-dir=/x"]).expect("parse").store(),
        StoreConfig::Dir(_)
    ));
    assert!(matches!(
        parse(&[]).expect("parse").store(),
        StoreConfig::Etcd(_)
    ));
}
