//! Quotes that no shell has taken away: in a manifest or a unit they become part of the value.

use std::path::{Path, PathBuf};

use super::Args;

/// Takes quotes around paths, names and URLs away, and says where. A password or a user name may begin and end with them.
pub(super) fn strip(args: &mut Args) -> Vec<String> {
    let mut warnings = Vec::new();
    let Args {
        etcd, kube, uplink, ..
    } = args;
    let paths = [
        ("subnet-file", Some(&mut args.subnet_file)),
        ("net-config-path", Some(&mut args.net_config_path)),
        ("cni-cache-dir", Some(&mut args.cni_cache_dir)),
        ("cni-socket", args.cni_socket.as_mut()),
        ("lease-dir", args.lease_dir.as_mut()),
        ("etcd-keyfile", etcd.etcd_keyfile.as_mut()),
        ("etcd-certfile", etcd.etcd_certfile.as_mut()),
        ("etcd-cafile", etcd.etcd_cafile.as_mut()),
        ("kubeconfig-file", kube.kubeconfig_file.as_mut()),
    ];
    for (flag, path) in paths {
        let Some(path) = path else { continue };
        let inner = path.to_str().and_then(quoted).map(PathBuf::from);
        if let Some(inner) = inner {
            warnings.push(told(flag, &inner));
            *path = inner;
        }
    }
    let mut endpoints = etcd.etcd_endpoints.join(",");
    let texts = [
        ("etcd-endpoints", Some(&mut endpoints)),
        ("etcd-prefix", Some(&mut etcd.etcd_prefix)),
        ("kube-api-url", kube.kube_api_url.as_mut()),
    ];
    let ifaces = uplink.iface.iter_mut().map(|name| ("iface", Some(name)));
    for (flag, text) in texts.into_iter().chain(ifaces) {
        let Some(text) = text else { continue };
        if let Some(inner) = quoted(text).map(str::to_owned) {
            // A URL may carry a password.
            warnings.push(match flag {
                "etcd-endpoints" | "kube-api-url" => told(flag, Path::new("what is between them")),
                _ => told(flag, Path::new(&inner)),
            });
            *text = inner;
        }
    }
    etcd.etcd_endpoints = endpoints.split(',').map(str::to_owned).collect();
    warnings
}

fn told(flag: &str, inner: &Path) -> String {
    format!(
        "--{flag} has quotes around its value, which are part of it where no shell takes them away: using {}",
        inner.display()
    )
}

/// What is between quotes.
fn quoted(text: &str) -> Option<&str> {
    let within = |quote| text.strip_prefix(quote)?.strip_suffix(quote);
    within('"')
        .or_else(|| within('\''))
        .filter(|inner| !inner.is_empty())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;

    fn read(flags: &[&str]) -> Args {
        let words = std::iter::once(&"flanneld").chain(flags);
        Args::read(words.map(OsString::from)).expect("flags")
    }

    #[test]
    fn quotes_are_taken_away_with_a_warning() {
        let args = read(&[
            "--kubeconfig-file=\"/x/admin.kubeconfig\"",
            "--etcd-certfile='/x/a b.pem'",
            "-etcd-endpoints=\"http://a:1,http://b:2\"",
            "-iface=\"eth0\"",
            "-iface=eth1",
            "-subnet-file=\"/x",
        ]);
        assert_eq!(
            args.kube.kubeconfig_file.as_deref(),
            Some(Path::new("/x/admin.kubeconfig"))
        );
        assert_eq!(
            args.etcd.etcd_certfile.as_deref(),
            Some(Path::new("/x/a b.pem"))
        );
        assert_eq!(args.etcd.etcd_endpoints, ["http://a:1", "http://b:2"]);
        assert_eq!(args.uplink.iface, ["eth0", "eth1"]);
        assert_eq!(args.subnet_file, Path::new("\"/x"));
        assert_eq!(args.warnings.len(), 4, "{:?}", args.warnings);
        assert_eq!(
            args.warnings[0],
            "--etcd-certfile has quotes around its value, which are part of it where no shell takes them away: using /x/a b.pem"
        );
        assert_eq!(
            read(&["-etcd-password=\"x\""])
                .etcd
                .etcd_password
                .as_deref(),
            Some("\"x\"")
        );
    }
}
