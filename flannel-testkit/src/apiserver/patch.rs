//! Patches: RFC 7386, and of Kubernetes' strategic merge what nodes, pods and events need.

use serde_json::{Map, Value};

/// Applies a merge patch (RFC 7386): objects are merged, `null` removes, all else replaces.
pub(crate) fn merge(target: &mut Value, patch: &Value) {
    apply(target, patch, &[], false);
}

/// Applies a strategic merge patch: like a merge patch, except that some lists of objects are merged by a key of theirs
/// and lists of finalizers as sets.
pub(crate) fn strategic(target: &mut Value, patch: &Value) {
    apply(target, patch, &[], true);
}

/// The keys by which lists are merged (`patchMergeKey` of the types in k8s.io/api/core/v1).
const MERGE_KEYS: [(&[&str], &str); 9] = [
    (&["status", "conditions"], "type"),
    (&["status", "addresses"], "type"),
    (&["metadata", "ownerReferences"], "uid"),
    (&["status", "podIPs"], "ip"),
    (&["spec", "containers"], "name"),
    (&["spec", "initContainers"], "name"),
    (&["spec", "volumes"], "name"),
    (&["spec", "imagePullSecrets"], "name"),
    (&["spec", "hostAliases"], "ip"),
];

/// Lists of scalars that are merged as sets.
const SETS: [&[&str]; 2] = [&["metadata", "finalizers"], &["spec", "podCIDRs"]];

fn apply(target: &mut Value, patch: &Value, path: &[&str], strategic: bool) {
    match patch {
        Value::Object(fields) => {
            if !target.is_object() {
                *target = Value::Object(Map::new());
            }
            let Some(object) = target.as_object_mut() else {
                return;
            };
            for (name, value) in fields {
                if value.is_null() {
                    object.remove(name);
                    continue;
                }
                let path: Vec<&str> = path.iter().copied().chain([name.as_str()]).collect();
                apply(
                    object.entry(name).or_insert(Value::Null),
                    value,
                    &path,
                    strategic,
                );
            }
        }
        Value::Array(items) if strategic => match merge_key(path) {
            Some(key) => merge_list(target, items, key),
            None if SETS.contains(&path) => union(target, items),
            None => *target = patch.clone(),
        },
        other => *target = other.clone(),
    }
}

/// By which field the elements of a list are told apart.
pub(crate) fn merge_key(path: &[&str]) -> Option<&'static str> {
    MERGE_KEYS
        .iter()
        .find(|(list, _)| *list == path)
        .map(|(_, key)| *key)
}

fn merge_list(target: &mut Value, patches: &[Value], key: &str) {
    if !target.is_array() {
        *target = Value::Array(Vec::new());
    }
    let Some(list) = target.as_array_mut() else {
        return;
    };
    for patch in patches {
        match list.iter_mut().find(|item| item[key] == patch[key]) {
            Some(item) => apply(item, patch, &[], true),
            None => list.push(without_nulls(patch)),
        }
    }
}

fn union(target: &mut Value, items: &[Value]) {
    if !target.is_array() {
        *target = Value::Array(Vec::new());
    }
    if let Some(list) = target.as_array_mut() {
        for item in items {
            if !list.contains(item) {
                list.push(item.clone());
            }
        }
    }
}

fn without_nulls(patch: &Value) -> Value {
    let mut fresh = Value::Null;
    apply(&mut fresh, patch, &[], true);
    fresh
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The examples in appendix A of RFC 7386.
    #[test]
    fn merge_patches_do_what_the_rfc_says() {
        let cases = [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (
                json!({"a": "b"}),
                json!({"b": "c"}),
                json!({"a": "b", "b": "c"}),
            ),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (
                json!({"a": "b", "b": "c"}),
                json!({"a": null}),
                json!({"b": "c"}),
            ),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "c"}), json!({"a": ["b"]}), json!({"a": ["b"]})),
            (
                json!({"a": {"b": "c"}}),
                json!({"a": {"b": "d", "c": null}}),
                json!({"a": {"b": "d"}}),
            ),
            (
                json!({"a": [{"b": "c"}]}),
                json!({"a": [1]}),
                json!({"a": [1]}),
            ),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a": "b"}), json!(["c"]), json!(["c"])),
            (json!({"a": "foo"}), json!(null), json!(null)),
            (json!({"a": "foo"}), json!("bar"), json!("bar")),
            (
                json!({"e": null}),
                json!({"a": 1}),
                json!({"e": null, "a": 1}),
            ),
            (
                json!([1, 2]),
                json!({"a": "b", "c": null}),
                json!({"a": "b"}),
            ),
            (
                json!({}),
                json!({"a": {"bb": {"ccc": null}}}),
                json!({"a": {"bb": {}}}),
            ),
        ];
        for (mut target, patch, want) in cases {
            let text = format!("{target} with {patch}");
            merge(&mut target, &patch);
            assert_eq!(target, want, "{text}");
        }
    }

    #[test]
    fn strategic_patches_merge_conditions_and_addresses_by_type() {
        let mut node = json!({
            "metadata": {"annotations": {"a": "1", "b": "2"}},
            "status": {
                "conditions": [
                    {"type": "Ready", "status": "True", "reason": "KubeletReady"},
                    {"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"},
                ],
                "addresses": [{"type": "InternalIP", "address": "192.0.2.1"}],
                "images": [{"names": ["x"]}],
            },
        });
        let patch = json!({
            "metadata": {"annotations": {"a": null, "c": "3"}},
            "status": {
                "conditions": [
                    {"type": "NetworkUnavailable", "status": "False", "reason": null},
                    {"type": "DiskPressure", "status": "False", "message": null},
                ],
                "addresses": [{"type": "Hostname", "address": "x"}],
                "images": [],
            },
        });
        strategic(&mut node, &patch);
        assert_eq!(
            node,
            json!({
                "metadata": {"annotations": {"b": "2", "c": "3"}},
                "status": {
                    "conditions": [
                        {"type": "Ready", "status": "True", "reason": "KubeletReady"},
                        {"type": "NetworkUnavailable", "status": "False"},
                        {"type": "DiskPressure", "status": "False"},
                    ],
                    "addresses": [
                        {"type": "InternalIP", "address": "192.0.2.1"},
                        {"type": "Hostname", "address": "x"},
                    ],
                    "images": [],
                },
            })
        );
        let mut fresh = json!({"status": {"conditions": [{"type": "Ready"}]}});
        merge(
            &mut fresh,
            &json!({"status": {"conditions": [{"type": "X"}]}}),
        );
        assert_eq!(fresh, json!({"status": {"conditions": [{"type": "X"}]}}));
    }
}
