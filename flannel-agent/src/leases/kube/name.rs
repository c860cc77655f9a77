//! Who this node is: `NODE_NAME`, or what the API says of the pod that this process runs in.

use std::sync::{Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::Pod;
use tracing::warn;

use super::{KubeLeases, KubeOptions};
use crate::leases::LeaseError;

/// This node's name, as far as it is known.
#[derive(Debug)]
pub(super) struct OwnName(Mutex<(Option<String>, Doubt)>);

/// Whether the API has to be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doubt {
    None,
    /// The name is that of the last known state.
    Remembered,
}

impl OwnName {
    pub(super) fn new(given: Option<String>) -> Self {
        Self(Mutex::new((given, Doubt::None)))
    }

    fn lock(&self) -> MutexGuard<'_, (Option<String>, Doubt)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self) -> Option<String> {
        self.lock().0.clone()
    }

    /// The name, unless it is only that of the last known state.
    fn certain(&self) -> Option<String> {
        let state = self.lock();
        state.0.clone().filter(|_| state.1 == Doubt::None)
    }

    pub(super) fn is_certain(&self) -> bool {
        self.certain().is_some()
    }

    /// Takes the name of the last known state, until the API is asked.
    pub(super) fn remember(&self, name: String) {
        let mut state = self.lock();
        if state.0.is_none() {
            *state = (Some(name), Doubt::Remembered);
        }
    }

    fn learn(&self, name: &str) {
        let mut state = self.lock();
        if let Some(before) = state.0.as_ref().filter(|before| *before != name) {
            warn!(
                "this node is {name:?}, not {before:?} as in the last known state: going on as {name:?}"
            );
        }
        *state = (Some(name.to_owned()), Doubt::None);
    }
}

/// Whether the node's name can be found out.
pub(super) fn check(options: &KubeOptions) -> Result<(), LeaseError> {
    let given = options.node_name.is_some()
        || (options.pod_name.is_some() && options.pod_namespace.is_some());
    if given {
        Ok(())
    } else {
        Err(LeaseError::KubeNodeUnknown)
    }
}

/// Upstream's check of `EVENT_QUEUE_DEPTH`, with Go's words.
pub(super) fn check_queue_depth(value: Option<&str>) -> Result<(), LeaseError> {
    let Some(value) = value else { return Ok(()) };
    let digits = value.strip_prefix(['+', '-']).unwrap_or(value);
    let reason = if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        "invalid syntax"
    } else if value.parse::<i64>().is_err() {
        "value out of range"
    } else {
        return Ok(());
    };
    Err(LeaseError::KubeQueueDepth {
        value: value.to_owned(),
        reason,
    })
}

/// Asks the API for our pod's node, unless the name is known for certain.
pub(super) async fn find(store: &KubeLeases) -> Result<String, LeaseError> {
    if let Some(name) = store.shared.own.certain() {
        return Ok(name);
    }
    let options = &store.shared.options;
    let (Some(namespace), Some(pod)) = (&options.pod_namespace, &options.pod_name) else {
        return Err(LeaseError::KubeNodeUnknown);
    };
    let place = format!("{namespace}/{pod}");
    let path = format!("/api/v1/namespaces/{namespace}/pods/{pod}");
    let found = store
        .shared
        .connection
        .get::<Pod>(&format!("error retrieving pod spec for '{place}'"), &path)
        .await?;
    let name = found
        .spec
        .and_then(|spec| spec.node_name)
        .filter(|name| !name.is_empty())
        .ok_or(LeaseError::KubePodWithoutNode { pod: place })?;
    store.shared.own.learn(&name);
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_queue_depth_is_read_as_go_reads_it() {
        for fine in [None, Some("5000"), Some("0"), Some("-1"), Some("+7")] {
            assert!(check_queue_depth(fine).is_ok(), "{fine:?}");
        }
        for (value, reason) in [
            ("abc", "invalid syntax"),
            ("", "invalid syntax"),
            ("1.5", "invalid syntax"),
            (" 1", "invalid syntax"),
            ("99999999999999999999", "value out of range"),
        ] {
            let error = check_queue_depth(Some(value)).unwrap_err().to_string();
            let wanted = format!(
                "env EVENT_QUEUE_DEPTH={value} format error: strconv.Atoi: parsing {value:?}: {reason}"
            );
            assert!(error.contains(&wanted), "{error}");
        }
    }
}
