use super::*;
use crate::json::compact;

const V4: &str = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
const V6: &str = "FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00::1/64\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n";

/// kube-flannel's configuration.
const KUBE: &str = r#"{"name":"cbr0","cniVersion":"1.0.0","type":"flannel","delegate":{"hairpinMode":true,"isDefaultGateway":true}}"#;

fn assemble(conf: &str, env: &str) -> Result<String, CniError> {
    let conf = NetConf::parse(conf.as_bytes())?;
    let env = SubnetEnv::parse("/env", env).unwrap();
    Ok(compact(&Delegate::assemble(&conf, &env)?.conf))
}

#[test]
fn golden_ipv4() {
    let conf = KUBE.replace(r#","isDefaultGateway":true"#, "");
    assert_eq!(
        assemble(&conf, V4).unwrap(),
        r#"{"cniVersion":"1.0.0","hairpinMode":true,"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}],"type":"host-local"},"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}"#
    );
}

/// What the live sample of upstream's plugin shows.
#[test]
fn golden_as_seen() {
    let conf = KUBE.replace(
        r#""delegate""#,
        r#""ipam":{"dataDir":"/var/lib/cni/a.ipam"},"delegate""#,
    );
    let env = V4
        .replace("10.1.17.1", "10.5.65.1")
        .replace("10.1.0.0", "10.5.0.0");
    assert_eq!(
        assemble(&conf, &env).unwrap(),
        r#"{"cniVersion":"1.0.0","hairpinMode":true,"ipMasq":false,"ipam":{"dataDir":"/var/lib/cni/a.ipam","ranges":[[{"subnet":"10.5.65.0/24"}]],"routes":[{"dst":"10.5.0.0/16"}],"type":"host-local"},"isDefaultGateway":true,"isGateway":true,"mtu":1450,"name":"cbr0","type":"bridge"}"#
    );
}

#[test]
fn golden_other_families_and_networks() {
    let ipam = |env: &str| {
        let text = assemble(KUBE, env).unwrap();
        let conf: Value = serde_json::from_str(&text).unwrap();
        conf["ipam"].to_string()
    };
    assert_eq!(
        ipam(V6),
        r#"{"ranges":[[{"subnet":"fc00::/64"}]],"routes":[{"dst":"fc00::/48"}],"type":"host-local"}"#
    );
    assert_eq!(
        ipam(&format!("{V4}{V6}")),
        r#"{"ranges":[[{"subnet":"10.1.17.0/24"}],[{"subnet":"fc00::/64"}]],"routes":[{"dst":"10.1.0.0/16"},{"dst":"fc00::/48"}],"type":"host-local"}"#
    );
    assert_eq!(
        ipam(&V4.replace("10.1.0.0/16", "10.1.0.0/16,192.168.0.0/16")),
        r#"{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"},{"dst":"192.168.0.0/16"}],"type":"host-local"}"#
    );
}

#[test]
fn addresses_are_given_as_wished_but_from_our_subnet() {
    let conf = r#"{"name":"n","ipam":{"type":"mine","subnet":"1.2.3.0/24","ranges":[[{"subnet":"10.9.0.0/16"}]],"dataDir":"/d",
        "routes":[{"dst":"0.0.0.0/0","gw":"10.1.17.9","mtu":0,"x":1},{"DST":"10.96.0.0/12","priority":5,"table":0}]}}"#;
    let text = assemble(conf, V4).unwrap();
    let delegate: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        delegate["ipam"].to_string(),
        r#"{"dataDir":"/d","ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"0.0.0.0/0","gw":"10.1.17.9"},{"dst":"10.96.0.0/12","priority":5,"table":0},{"dst":"10.1.0.0/16"}],"subnet":"1.2.3.0/24","type":"mine"}"#
    );
    assert!(delegate.get("cniVersion").is_none(), "{text}");
    for (routes, said) in [
        ("1", "1 is not a list of routes"),
        ("[1]", "1 is not a route"),
        (r#"[{"dst":"x"}]"#, "invalid CIDR address: x"),
        (r#"[{"gw":"10.1.1.1"}]"#, r#"{"gw":"10.1.1.1"} has no dst"#),
    ] {
        let conf = format!(r#"{{"name":"n","ipam":{{"routes":{routes}}}}}"#);
        let error = assemble(&conf, V4).unwrap_err();
        assert_eq!(
            error.msg,
            format!("failed to assemble Delegate IPAM: failed to read IPAM routes: {said}")
        );
    }
}

#[test]
fn what_the_delegate_says_itself_stands() {
    let conf = r#"{"name":"n","cniVersion":"0.4.0","runtimeConfig":{"mac":"02:00:00:00:00:01"},
        "delegate":{"type":"ptp","cniVersion":"0.3.1","mtu":1400,"ipMasq":true,"runtimeConfig":{}}}"#;
    let text = assemble(conf, V4).unwrap();
    let delegate: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(delegate["type"], "ptp");
    assert_eq!(delegate["mtu"], 1400);
    assert_eq!(delegate["ipMasq"], true);
    assert_eq!(delegate["cniVersion"], "0.4.0", "ours beats the delegate's");
    assert_eq!(delegate["runtimeConfig"]["mac"], "02:00:00:00:00:01");
    assert!(delegate.get("isGateway").is_none(), "only a bridge has one");
    let text = assemble(
        r#"{"name":"n","delegate":{"isGateway":false,"cniVersion":"0.3.1"}}"#,
        V4,
    );
    let delegate: Value = serde_json::from_str(&text.unwrap()).unwrap();
    assert_eq!(delegate["isGateway"], false);
    assert_eq!(delegate["cniVersion"], "0.3.1");
}

#[test]
fn masquerading_is_somebodys_job_once() {
    let masq = |value: &str| {
        let env = V4.replace("IPMASQ=true", value);
        let text = assemble(KUBE, &env).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["ipMasq"].clone()
    };
    assert_eq!(masq("IPMASQ=true"), false);
    assert_eq!(masq("IPMASQ=false"), true);
}

#[test]
fn what_is_flannels_to_say_is_refused() {
    for (delegate, said) in [
        (
            r#"{"type":1}"#,
            "'delegate' dictionary, if present, must have (string) 'type' field",
        ),
        (
            r#"{"name":"x"}"#,
            "'delegate' dictionary must not have 'name' field, it'll be set by flannel",
        ),
        (
            r#"{"ipam":{}}"#,
            "'delegate' dictionary must not have 'ipam' field, it'll be set by flannel",
        ),
    ] {
        let conf = format!(r#"{{"name":"n","delegate":{delegate}}}"#);
        let error = assemble(&conf, V4).unwrap_err();
        assert_eq!((error.code, error.msg.as_str()), (999, said));
    }
}

#[test]
fn a_reconstruction_frees_from_where_it_was_given() {
    let conf = NetConf::parse(
        br#"{"name":"n","cniVersion":"1.0.0","prevResult":{"ips":[{"address":"10.1.17.5/24"},{"address":"fc00::5/64"},{"address":"x"}]}}"#,
    )
    .unwrap();
    let delegate = Delegate::reconstruct(&conf, &conf.subnets_before()).unwrap();
    assert_eq!(
        compact(&delegate.conf),
        r#"{"cniVersion":"1.0.0","ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}],[{"subnet":"fc00::/64"}]],"routes":[],"type":"host-local"},"isGateway":true,"name":"n","type":"bridge"}"#
    );
    assert_eq!(delegate.bridge(), Some("cni0"));
    assert_eq!(delegate.with("bridge", json!("br7")).bridge(), Some("br7"));
}

#[test]
fn what_was_saved_is_read_back() {
    let text = assemble(KUBE, V4).unwrap();
    let delegate = Delegate::read(&text).unwrap();
    assert_eq!(
        (delegate.kind.as_str(), delegate.network()),
        ("bridge", Some("cbr0"))
    );
    assert_eq!(compact(&delegate.conf), text);
    for text in ["", "{", "[]", "{}", r#"{"type":1}"#] {
        assert!(Delegate::read(text).is_err(), "{text}");
    }
}
