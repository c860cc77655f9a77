//! Who this node is: `NODE_NAME`, or what the API says of the pod that this process runs in.

use k8s_openapi::api::core::v1::Pod;

use super::{KubeLeases, KubeOptions};
use crate::leases::LeaseError;

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

/// Asks the API for our pod's node, unless the name is known.
pub(super) async fn find(store: &KubeLeases) -> Result<String, LeaseError> {
    let options = &store.shared.options;
    let ask = async || {
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
        found
            .spec
            .and_then(|spec| spec.node_name)
            .filter(|name| !name.is_empty())
            .ok_or(LeaseError::KubePodWithoutNode { pod: place })
    };
    store.shared.node.get_or_try_init(ask).await.cloned()
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
