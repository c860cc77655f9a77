use super::*;

#[test]
fn backend_errors_name_the_value_and_the_fix() {
    let cases = [
        (
            "1",
            "Backend.Type is a number (1): write a string, such as \"vxlan\"",
        ),
        (
            r#""vxlan","VNI":16777216"#,
            "Backend.VNI is 16777216: use a value between 0 and 16777215",
        ),
        (
            r#""vxlan","VNI":-1"#,
            "Backend.VNI is -1: use a value between 0 and 16777215",
        ),
        (
            r#""vxlan","VNI":10000000"#,
            "Backend.VNI is 10000000: device name flannel.10000000 would have more than 15 characters, use at most 9999999",
        ),
        (
            r#""vxlan","VNI":"3""#,
            "Backend.VNI is a string (\"3\"): write a whole number without quotes",
        ),
        (
            r#""vxlan","VNI":1.5"#,
            "Backend.VNI is a number (1.5): write a whole number without quotes",
        ),
        (
            r#""vxlan","VNI":true"#,
            "Backend.VNI is a boolean (true): write a whole number without quotes",
        ),
        (
            r#""vxlan","Port":70000"#,
            "Backend.Port is 70000: use a value between 0 and 65535",
        ),
        (
            r#""vxlan","MTU":40"#,
            "Backend.MTU is 40: it is the MTU of the underlay and must be at least 1330, or 0 for the one of the uplink",
        ),
        (
            r#""vxlan","MTU":65586"#,
            "Backend.MTU is 65586: use a value between 0 and 65585",
        ),
        (
            r#""vxlan","BpfFastPath":"fast""#,
            "Backend.BpfFastPath is \"fast\": use one of the strings \"auto\", \"off\", \"established\" and \"syn\"",
        ),
        (
            r#""vxlan","BpfFastPath":true"#,
            "Backend.BpfFastPath is a boolean (true): write one of the strings \"auto\", \"off\", \"established\" and \"syn\"",
        ),
        (
            r#""vxlan","GBP":1"#,
            "Backend.GBP is a number (1): write true or false",
        ),
    ];
    for (kind, expected) in cases {
        let json = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":{kind}}}}}"#);
        assert_eq!(message(&json), expected);
    }
    assert_eq!(
        message(r#"{"Network":"10.5.0.0/16","Backend":"vxlan"}"#),
        "Backend is a string (\"vxlan\"): write an object such as {\"Type\":\"vxlan\"}"
    );
}

#[test]
fn network_errors_name_the_value_and_the_fix() {
    let cases = [
        (
            "",
            "please define a correct Network parameter in the flannel config, such as \"Network\":\"10.244.0.0/16\"",
        ),
        (
            r#""Network":7,"#,
            "Network is a number (7): write a string such as \"10.244.0.0/16\"",
        ),
        (
            r#""Network":"fd00::/48","#,
            "invalid IPv4 CIDR format: Network is \"fd00::/48\", write one such as 10.244.0.0/16",
        ),
        (
            r#""Network":"10.5.0.0","#,
            "invalid IPv4 CIDR format: Network is \"10.5.0.0\", write one such as 10.244.0.0/16",
        ),
        (
            r#""Network":"10.5.0.0/29","#,
            "network is too small. Minimum useful network prefix is /28: Network is 10.5.0.0/29",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetLen":31,"#,
            "SubnetLen must be less than /31: SubnetLen is 31",
        ),
        (
            r#""Network":"10.5.0.0/32","SubnetLen":30,"#,
            "network must be able to accommodate at least four subnets: SubnetLen is 30, use at least 34 with 10.5.0.0/32",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetLen":17,"#,
            "network must be able to accommodate at least four subnets: SubnetLen is 17, use at least 18 with 10.5.0.0/16",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetLen":"24","#,
            "SubnetLen is a string (\"24\"): write a whole number without quotes",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetLen":-1,"#,
            "SubnetLen is -1: use a value between 0 and 32",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetMin":"10.6.0.0","#,
            "SubnetMin is not in the range of the Network: SubnetMin is 10.6.0.0, use an address inside 10.5.0.0/16",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetMax":"10.6.0.0","#,
            "SubnetMax is not in the range of the Network: SubnetMax is 10.6.0.0, use an address inside 10.5.0.0/16",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetMin":"10.5.1.7","#,
            "SubnetMin is not on a SubnetLen boundary: 10.5.1.7: SubnetMin is 10.5.1.7, use 10.5.1.0 for subnets of /24",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetMax":"x","#,
            "SubnetMax is \"x\": not an address of this family, write a string such as \"10.244.1.0\"",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetMin":"10.5.9.0","SubnetMax":"10.5.3.0","#,
            "SubnetMin is 10.5.9.0: it is above SubnetMax 10.5.3.0, so there is no subnet to give out: swap or widen them",
        ),
        (
            r#""Network":"10.5.0.0/16","EnableIPv4":"yes","#,
            "EnableIPv4 is a string (\"yes\"): write true or false",
        ),
        (
            r#""Network":"10.5.0.0/16","EnableIPv4":false,"#,
            "none defined stack: EnableIPv4 and EnableIPv6 are both false, set one of them to true",
        ),
        (
            r#""Network":"10.5.0.0/16","EnableIPv6":true,"#,
            "please define a correct IPv6Network parameter in the flannel config, such as \"IPv6Network\":\"fd00:10:244::/48\"",
        ),
        (
            r#""Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/125","#,
            "IPv6Network is too small. Minimum useful network prefix is /124: IPv6Network is fd00::/125",
        ),
        (
            r#""Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetLen":127,"#,
            "SubnetLen must be less than /127: IPv6SubnetLen is 127",
        ),
        (
            r#""Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","IPv6SubnetMin":"fd01::","#,
            "IPv6SubnetMin is not in the range of the IPv6Network: IPv6SubnetMin is fd01::, use an address inside fd00::/48",
        ),
        (
            r#""Network":"10.5.0.0/16","SubnetMax":"10.5.9.1","#,
            "SubnetMax is not on a SubnetLen boundary: 10.5.9.1: SubnetMax is 10.5.9.1, use 10.5.9.0 for subnets of /24",
        ),
        (
            r#""EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"fd00::/48","IPv6SubnetLen":49,"#,
            "network must be able to accommodate at least four subnets: IPv6SubnetLen is 49, use at least 50 with fd00::/48",
        ),
        (
            r#""EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"fd00::/48","IPv6SubnetMax":"fd01::","#,
            "IPv6SubnetMax is not in the range of the IPv6Network: IPv6SubnetMax is fd01::, use an address inside fd00::/48",
        ),
        (
            r#""EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"fd00::/48","IPv6SubnetMin":"fd00::7","#,
            "IPv6SubnetMin is not on a SubnetLen boundary: fd00::7: IPv6SubnetMin is fd00::7, use fd00:: for subnets of /64",
        ),
        (
            r#""EnableIPv6":true,"Network":"10.5.0.0/16","IPv6Network":"fd00::/48","IPv6SubnetMax":"fd00::7","#,
            "IPv6SubnetMax is not on a SubnetLen boundary: fd00::7: IPv6SubnetMax is fd00::7, use fd00:: for subnets of /64",
        ),
        (
            r#""IPv6Network":"fd00\n::/48","#,
            "invalid CIDR address: fd00\\n::/48: IPv6Network is \"fd00\\n::/48\", write one such as fd00:10:244::/48",
        ),
        (
            r#""IPv6Network":"10.0.0.0/8","#,
            "invalid CIDR address: 10.0.0.0/8: IPv6Network is \"10.0.0.0/8\", write one such as fd00:10:244::/48",
        ),
    ];
    for (text, expected) in cases {
        let json = format!(r#"{{{text}"Backend":{{"Type":"vxlan"}}}}"#);
        assert_eq!(message(&json), expected);
    }
}

#[test]
fn text_that_is_no_config() {
    assert_eq!(
        message(""),
        r#"network config is not valid JSON: EOF while parsing a value at line 1 column 0: write an object such as {"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#
    );
    assert_eq!(
        message("{} x"),
        r#"network config is not valid JSON: trailing characters at line 1 column 4: write an object such as {"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#
    );
    assert_eq!(
        message("[]"),
        r#"network config is an array: it must be an object such as {"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#
    );
}
