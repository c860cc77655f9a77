//! Errors as the CNI specification wants them: a JSON object on standard output.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The configuration's version is not one of ours.
pub(crate) const INCOMPATIBLE_VERSION: u32 = 1;
/// The container is not known.
pub(crate) const UNKNOWN_CONTAINER: u32 = 3;
/// A `CNI_*` variable is missing or wrong.
pub(crate) const INVALID_ENVIRONMENT: u32 = 4;
/// Reading or writing failed.
pub(crate) const IO_FAILURE: u32 = 5;
/// Something is not JSON, or not of the right shape.
pub(crate) const DECODING_FAILURE: u32 = 6;
/// The network configuration is wrong.
pub(crate) const INVALID_NETWORK_CONFIG: u32 = 7;
/// The container's network namespace is the host's. Not in the specification, but in libcni.
pub(crate) const INVALID_NETNS: u32 = 8;
/// No pod can be added at present.
pub(crate) const NOT_AVAILABLE: u32 = 50;
/// Anything else. Not in the specification, but in libcni.
pub(crate) const INTERNAL: u32 = 999;

/// What a plugin says when it fails.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CniError {
    #[serde(default)]
    pub(crate) code: u32,
    #[serde(default)]
    pub(crate) msg: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) details: String,
}

impl CniError {
    pub(crate) fn new(code: u32, msg: impl Into<String>) -> Self {
        Self {
            code,
            msg: msg.into(),
            details: String::new(),
        }
    }

    pub(crate) fn internal(msg: impl Into<String>) -> Self {
        Self::new(INTERNAL, msg)
    }

    pub(crate) fn with_details(self, details: impl Into<String>) -> Self {
        Self {
            details: details.into(),
            ..self
        }
    }
}

/// Plain: message and details as libcni prints them. Alternate: the JSON that goes to the runtime, in libcni's indentation.
impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if f.alternate() {
            return f.write_str(&crate::json::pretty(self));
        }
        f.write_str(&self.msg)?;
        if !self.details.is_empty() {
            write!(f, "; {}", self.details)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms() {
        let error = CniError::new(INCOMPATIBLE_VERSION, "incompatible CNI versions")
            .with_details("config is \"9\"");
        assert_eq!(
            error.to_string(),
            "incompatible CNI versions; config is \"9\""
        );
        assert_eq!(
            format!("{error:#}"),
            "{\n    \"code\": 1,\n    \"msg\": \"incompatible CNI versions\",\n    \"details\": \"config is \\\"9\\\"\"\n}"
        );
        let bare = format!("{:#}", CniError::internal("x"));
        assert_eq!(bare, "{\n    \"code\": 999,\n    \"msg\": \"x\"\n}");
    }
}
