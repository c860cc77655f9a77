//! `br_netfilter`, without which packets between pods of one bridge bypass iptables, and with it kube-proxy's service rules.
//!
//! The overlay does not need it, so that its absence is never fatal (upstream ends: pkg/utils, main.go).

use std::path::{Path, PathBuf};

use flannel_core::config::NetConf;

use crate::kernel_modules;

/// Where the module shows itself.
const DIR: &str = "/proc/sys/net/bridge";

/// Loads the module where it is missing and iptables is in use. What cannot be done is told in one warning.
pub(crate) async fn ensure(conf: &NetConf) {
    if missing(conf, Path::new(DIR)).is_none() {
        return;
    }
    let failed = kernel_modules::load("br_netfilter").await.err();
    match missing(conf, Path::new(DIR)) {
        None => tracing::info!("loaded the kernel module br_netfilter"),
        Some(path) => tracing::warn!(
            reason = failed.unwrap_or_else(|| "the module shows nothing there".to_owned()),
            "{} is missing: iptables does not see packets between pods of one bridge, so that service addresses do not work between \
             pods of this node; load the module with \"modprobe br_netfilter\"",
            path.display()
        ),
    }
}

/// The first setting that is missing, of those that iptables needs.
fn missing(conf: &NetConf, dir: &Path) -> Option<PathBuf> {
    if conf.enable_nftables {
        return None;
    }
    let wanted = [
        conf.enable_ipv4.then_some("bridge-nf-call-iptables"),
        conf.enable_ipv6.then_some("bridge-nf-call-ip6tables"),
    ];
    let paths = wanted.into_iter().flatten().map(|name| dir.join(name));
    paths.into_iter().find(|path| !path.exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed_depends_on_families_and_firewall() {
        let dir = tempfile::tempdir().expect("a directory");
        let missing = |keys: &str| {
            let json = format!(
                r#"{{"Network":"10.5.0.0/16","IPv6Network":"fd00::/48",{keys},"Backend":{{"Type":"vxlan"}}}}"#
            );
            let path = missing(&NetConf::parse(&json).expect("a configuration"), dir.path());
            path.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        };
        let (v4, v6) = ("bridge-nf-call-iptables", "bridge-nf-call-ip6tables");
        let none = r#""EnableNFTables":true"#;
        let dual = r#""EnableIPv6":true"#;
        let only6 = r#""EnableIPv6":true,"EnableIPv4":false"#;
        assert_eq!(missing(none), None);
        assert_eq!(missing(dual).as_deref(), Some(v4));
        assert_eq!(missing(only6).as_deref(), Some(v6));
        std::fs::write(dir.path().join(v4), "1").expect("write");
        assert_eq!(missing(r#""EnableIPv6":false"#), None);
        assert_eq!(missing(dual).as_deref(), Some(v6));
        std::fs::write(dir.path().join(v6), "1").expect("write");
        assert_eq!(missing(dual), None);
    }
}
