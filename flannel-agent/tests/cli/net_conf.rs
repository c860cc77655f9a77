//! Network configurations that no node could use.

use flannel_testkit::{Etcd, Lab, privileged};

use crate::place::Place;

#[test]
fn bad_network_configurations_are_refused() {
    if !privileged() {
        return;
    }
    let place = Place::new();
    let config = place.lease_dir.display().to_string();
    let vxlan = |settings: &str| {
        format!(r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"vxlan"{settings}}}}}"#)
    };
    let v4 = |settings: &str| format!(r#"{{{settings},"Backend":{{"Type":"vxlan"}}}}"#);
    let network = |settings: &str| v4(&format!(r#""Network":"10.244.0.0/16",{settings}"#));
    let cases = [
        (String::new(), &["JSON", "10.244.0.0/16"][..]),
        ("{".into(), &["JSON", "line 1", "10.244.0.0/16"]),
        ("Network: 10.244.0.0/16".into(), &["JSON", "10.244.0.0/16"]),
        ("[]".into(), &["an array", "object"]),
        (
            v4(r#""Network":5"#),
            &["Network is a number (5)", "10.244.0.0/16"],
        ),
        (
            v4(r#""Network":"10.244.0.0""#),
            &["\"10.244.0.0\"", "10.244.0.0/16"],
        ),
        (
            v4(r#""Network":"10.244.0.0/33""#),
            &["\"10.244.0.0/33\"", "CIDR"],
        ),
        (
            v4(r#""Network":"10.244.0.0/29""#),
            &["10.244.0.0/29", "/28"],
        ),
        (v4(r#""Network":"10.\n244""#), &["10.\\n244"]),
        (v4(r#""Other":1"#), &["Network", "10.244.0.0/16"]),
        (
            network(r#""SubnetLen":"24""#),
            &["SubnetLen", "\"24\"", "without quotes"],
        ),
        (
            network(r#""SubnetLen":31"#),
            &["SubnetLen is 31", "less than /31"],
        ),
        (
            network(r#""SubnetLen":17"#),
            &["SubnetLen is 17", "four subnets"],
        ),
        (
            network(r#""SubnetMin":"10.245.0.0""#),
            &["10.245.0.0", "10.244.0.0/16"],
        ),
        (
            network(r#""SubnetMin":"10.244.9.1""#),
            &["10.244.9.1", "10.244.9.0"],
        ),
        (
            network(r#""SubnetMin":"10.244.9.0","SubnetMax":"10.244.8.0""#),
            &["10.244.9.0", "10.244.8.0", "swap"],
        ),
        (network(r#""EnableIPv4":false"#), &["EnableIPv4", "true"]),
        (
            network(r#""EnableIPv4":"yes""#),
            &["EnableIPv4", "\"yes\"", "true or false"],
        ),
        (
            vxlan(r#","VNI":16777216"#),
            &["VNI is 16777216", "16777215"],
        ),
        (vxlan(r#","VNI":10000000"#), &["VNI is 10000000", "9999999"]),
        (vxlan(r#","VNI":-1"#), &["VNI is -1", "16777215"]),
        (vxlan(r#","VNI":"3""#), &["VNI", "\"3\"", "without quotes"]),
        (vxlan(r#","Port":70000"#), &["Port is 70000", "65535"]),
        (vxlan(r#","MTU":40"#), &["MTU is 40", "1330"]),
        (vxlan(r#","GBP":1"#), &["GBP", "(1)", "true or false"]),
        (
            r#"{"Network":"10.244.0.0/16","Backend":{"Type":"ipsec"}}"#.into(),
            &["ipsec", "vxlan"],
        ),
        (
            r#"{"Network":"10.244.0.0/16","Backend":{"Type":"a\nb"}}"#.into(),
            &["a\\nb", "vxlan"],
        ),
        (
            r#"{"Network":"10.244.0.0/16","Backend":{}}"#.into(),
            &["backend type", "vxlan"],
        ),
        (
            r#"{"Network":"10.244.0.0/16","Backend":"vxlan"}"#.into(),
            &["Backend", "\"vxlan\"", "{\"Type\":\"vxlan\"}"],
        ),
    ];
    for (conf, needles) in &cases {
        place.set_conf(conf.as_bytes());
        let needles: Vec<&str> = needles.iter().copied().chain([config.as_str()]).collect();
        place.assert_refused(conf, &needles, || place.run(&[], &[]));
    }
    place.set_conf(b"{\"Network\":\"\xff\"}");
    place.refuses(&[], &["leases/config", "UTF-8", "10.244.0.0/16"]);

    // From etcd only a backend that is none of ours is refused, naming key and endpoint: everything else can be mended there.
    let ip = Lab::GATEWAY;
    let etcd = Etcd::start(Some(place.lab.underlay()), ip).expect("etcd");
    let endpoints = format!("--etcd-endpoints={}", etcd.endpoint());
    let flags = place.flags();
    let refused = cases.iter().filter(|(_, needles)| {
        let is_backend = |needle: &&str| ["ipsec", "backend type", "a\\nb"].contains(needle);
        needles.iter().any(is_backend)
    });
    for (conf, needles) in refused {
        etcd.put("/net/config", conf).expect("put");
        let endpoint = etcd.endpoint();
        let needles: Vec<&str> = needles
            .iter()
            .copied()
            .chain([&*endpoint, "/net"])
            .collect();
        place.assert_refused(conf, &needles, || {
            place.run_bare(&[&endpoints, "--etcd-prefix=/net", &flags[1]], &[])
        });
    }
}
