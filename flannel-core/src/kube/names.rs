//! Names of annotations (upstream: pkg/subnet/kube/annotations.go).

use std::fmt;

use thiserror::Error;

/// flannel's default for `--kube-annotation-prefix`.
pub const DEFAULT_PREFIX: &str = "flannel.alpha.coreos.com";

/// Why a prefix was refused, in upstream's words.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PrefixError {
    /// More than one slash.
    #[error(
        "subnet/kube: prefix can contain at most single slash: --kube-annotation-prefix={prefix} has more"
    )]
    Slashes {
        /// The prefix as given.
        prefix: String,
    },
    /// Not the name of a domain in front of the slash, or something else than lower-case letters, digits, `_` and `-` behind it.
    #[error(
        "subnet/kube: prefix must be in a format: fqdn/[0-9a-z-_]*: --kube-annotation-prefix={prefix} is not, \
         write one such as {DEFAULT_PREFIX}"
    )]
    Format {
        /// The prefix as given.
        prefix: String,
    },
}

/// An annotation of flannel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Field {
    /// Whether the node takes part, `true`.
    KubeSubnetManager,
    /// `vxlan`.
    BackendType,
    /// The tunnel end point for IPv4.
    BackendData,
    /// The tunnel end point for IPv6.
    BackendV6Data,
    /// Where other nodes send IPv4 tunnel packets to.
    PublicIp,
    /// Where other nodes send IPv6 tunnel packets to.
    PublicIpv6,
    /// An administrator's word on what to publish as `public-ip`.
    PublicIpOverwrite,
    /// An administrator's word on what to publish as `public-ipv6`.
    PublicIpv6Overwrite,
    /// An administrator's word in place of `--public-ip`.
    NodePublicIp,
    /// An administrator's word in place of `--public-ipv6`.
    NodePublicIpv6,
}

impl Field {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::KubeSubnetManager,
        Self::BackendType,
        Self::BackendData,
        Self::BackendV6Data,
        Self::PublicIp,
        Self::PublicIpv6,
        Self::PublicIpOverwrite,
        Self::PublicIpv6Overwrite,
        Self::NodePublicIp,
        Self::NodePublicIpv6,
    ];

    /// The name behind the prefix.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::KubeSubnetManager => "kube-subnet-manager",
            Self::BackendType => "backend-type",
            Self::BackendData => "backend-data",
            Self::BackendV6Data => "backend-v6-data",
            Self::PublicIp => "public-ip",
            Self::PublicIpv6 => "public-ipv6",
            Self::PublicIpOverwrite => "public-ip-overwrite",
            Self::PublicIpv6Overwrite => "public-ipv6-overwrite",
            Self::NodePublicIp => "node-public-ip",
            Self::NodePublicIpv6 => "node-public-ipv6",
        }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.suffix())
    }
}

/// The names of all annotations under one prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// The prefix as given.
    raw: String,
    /// What stands in front of every name, `/` or `-` included.
    prefix: String,
}

impl Names {
    /// Reads `--kube-annotation-prefix`.
    pub fn new(raw: &str) -> Result<Self, PrefixError> {
        let mut prefix = raw.to_owned();
        if raw.matches('/').count() > 1 {
            return Err(PrefixError::Slashes { prefix });
        }
        if !prefix.contains('/') {
            prefix.push('/');
        }
        if !prefix.ends_with(['/', '-']) {
            prefix.push('-');
        }
        if !is_well_formed(&prefix) {
            let prefix = raw.to_owned();
            return Err(PrefixError::Format { prefix });
        }
        Ok(Self {
            raw: raw.to_owned(),
            prefix,
        })
    }

    /// The full name of an annotation.
    pub fn key(&self, field: Field) -> String {
        format!("{}{field}", self.prefix)
    }

    /// Where upstream looks for its own MAC address: under the prefix as given, with a slash, which is another name than the one it
    /// writes as soon as the prefix has something behind its slash.
    pub fn stored_data_key(&self) -> String {
        format!("{}/{}", self.raw, Field::BackendData)
    }
}

/// Upstream's pattern `(?:[a-z0-9_-]+\.)+[a-z0-9_-]+/(?:[a-z0-9_-]+-)?$`, which nothing holds to the beginning of the text.
fn is_well_formed(prefix: &str) -> bool {
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == '-';
    let Some((host, rest)) = prefix.split_once('/') else {
        return false;
    };
    let Some((before, last)) = host.rsplit_once('.') else {
        return false;
    };
    let rest_fits =
        rest.is_empty() || (rest.len() > 1 && rest.ends_with('-') && rest.chars().all(allowed));
    before.ends_with(allowed) && !last.is_empty() && last.chars().all(allowed) && rest_fits
}
