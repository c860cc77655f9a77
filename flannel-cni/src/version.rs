//! Versions of the CNI specification.

use std::fmt;

use crate::{
    complain,
    error::{CniError, DECODING_FAILURE, INCOMPATIBLE_VERSION},
    json::{self, Object},
};

/// Every version that we know, oldest first.
pub(crate) const SUPPORTED: [&str; 7] = [
    "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0",
];
/// What a configuration without a version means.
const UNSAID: &str = "0.1.0";
/// The first version with CHECK.
pub(crate) const WITH_CHECK: Version = Version(0, 4, 0);
/// The first version with GC and STATUS.
pub(crate) const WITH_GC: Version = Version(1, 1, 0);

/// A version, to be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(u32, u32, u32);

impl Version {
    /// Reads `major[.minor[.micro]]`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('.');
        let mut next = || match parts.next() {
            None => Some(0),
            Some(part) => part.parse().ok(),
        };
        let version = Self(next()?, next()?, next()?);
        parts.next().is_none().then_some(version)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// The version of a configuration, as it says it.
pub(crate) fn of(conf: &Object) -> Result<&str, CniError> {
    match json::field(conf, "cniVersion") {
        None => Ok(UNSAID),
        Some(value) => match value.as_str() {
            Some("") => Ok(UNSAID),
            Some(version) => Ok(version),
            None => Err(CniError::new(
                DECODING_FAILURE,
                "decoding version from network config: cniVersion is not a string",
            )),
        },
    }
}

/// Refuses a version that we do not know.
pub(crate) fn check(version: &str) -> Result<(), CniError> {
    if SUPPORTED.contains(&version) {
        return Ok(());
    }
    let known: Vec<String> = SUPPORTED.iter().map(|known| format!("{known:?}")).collect();
    Err(
        CniError::new(INCOMPATIBLE_VERSION, "incompatible CNI versions").with_details(format!(
            "config is {version:?}, plugin supports [{}]",
            known.join(" ")
        )),
    )
}

/// Refuses a version that is older than a command.
pub(crate) fn check_allows(version: &str, command: &str, needed: Version) -> Result<(), CniError> {
    let Some(parsed) = Version::parse(version) else {
        return Err(CniError::new(
            DECODING_FAILURE,
            format!(
                "invalid version {version:?} in the network config: write one such as {needed}"
            ),
        ));
    };
    if parsed < needed {
        return Err(CniError::new(
            INCOMPATIBLE_VERSION,
            format!("config version does not allow {command}"),
        ));
    }
    check(version)
}

/// The answer to VERSION.
pub(crate) fn answer() -> String {
    let newest = SUPPORTED.last().copied().unwrap_or_default();
    let known: Vec<String> = SUPPORTED.iter().map(|known| format!("{known:?}")).collect();
    format!(
        "{{\"cniVersion\":{newest:?},\"supportedVersions\":[{}]}}\n",
        known.join(",")
    )
}

/// What we say when nobody has called us as a plugin.
pub(crate) fn about() -> String {
    format!(
        "CNI Plugin flannel version v{} (linux/{}) of flannel-ebpf\nCNI protocol versions supported: {}",
        env!("CARGO_PKG_VERSION"),
        architecture(),
        SUPPORTED.join(", ")
    )
}

/// Go's name of it, as upstream prints it.
const fn architecture() -> &'static str {
    if cfg!(target_arch = "x86_64") {
        "amd64"
    } else if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        std::env::consts::ARCH
    }
}

/// The versions in a delegate's answer to VERSION. None that we can read is none.
pub(crate) fn in_answer(answer: &str) -> Vec<String> {
    #[derive(serde::Deserialize)]
    struct Answer {
        #[serde(rename = "supportedVersions", default)]
        supported: Vec<String>,
    }
    match serde_json::from_str::<Answer>(answer) {
        Ok(answer) => answer.supported,
        Err(error) => {
            complain(&format!("the delegate's answer to VERSION: {error}"));
            Vec::new()
        }
    }
}

/// The newest version that a delegate and we know.
pub(crate) fn newest_common(theirs: &[String]) -> Option<&'static str> {
    let mut ours = SUPPORTED.into_iter().rev();
    ours.find(|version| theirs.iter().any(|known| known == version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        let version = |text| Version::parse(text).unwrap();
        assert!(version("0.10.0") > version("0.4.0"));
        assert_eq!(version("1"), version("1.0.0"));
        for text in ["", "1.x", "1.0.0.0", "v1.0.0", "-1.0"] {
            assert_eq!(Version::parse(text), None, "{text}");
        }
    }

    #[test]
    fn the_answer_is_upstreams() {
        assert_eq!(
            answer(),
            "{\"cniVersion\":\"1.1.0\",\"supportedVersions\":[\"0.1.0\",\"0.2.0\",\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]}\n"
        );
        assert_eq!(in_answer(&answer()), SUPPORTED);
        assert!(in_answer("").is_empty());
        let older = ["0.3.0".to_owned(), "1.0.0".to_owned(), "7.0.0".to_owned()];
        assert_eq!(newest_common(&older), Some("1.0.0"));
        assert_eq!(newest_common(&[]), None);
    }

    #[test]
    fn unknown_and_too_old_versions_are_refused() {
        let error = check("9.9.9").unwrap_err();
        assert_eq!(
            (error.code, error.msg.as_str()),
            (1, "incompatible CNI versions")
        );
        assert!(
            error
                .details
                .starts_with("config is \"9.9.9\", plugin supports [\"0.1.0\" \""),
            "{error}"
        );
        let error = check_allows("0.3.1", "CHECK", WITH_CHECK).unwrap_err();
        assert_eq!(
            (error.code, error.msg.as_str()),
            (1, "config version does not allow CHECK")
        );
        assert!(check_allows("1.1.0", "GC", WITH_GC).is_ok());
        assert_eq!(check_allows("1.2.0", "GC", WITH_GC).unwrap_err().code, 1);
        assert_eq!(check_allows("x", "GC", WITH_GC).unwrap_err().code, 6);
    }
}
