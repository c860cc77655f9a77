//! `metadata.managedFields`: who has set what. Ownership is recorded and never taken away, which is all that our clients can see.

use super::patch::merge_key;
use serde_json::{Map, Value, json};

/// Who writes, and through which resource.
#[derive(Clone, Debug)]
pub(crate) struct Manager<'a> {
    pub(crate) name: &'a str,
    pub(crate) api_version: &'a str,
    /// Whether through `/status`.
    pub(crate) status: bool,
}

/// Notes that `manager` has set what is in `touched`.
pub(crate) fn record(object: &mut Value, manager: &Manager<'_>, touched: &Value, now: &str) {
    let set = fields(touched, &mut Vec::new());
    let metadata = &mut object["metadata"];
    if !metadata["managedFields"].is_array() {
        metadata["managedFields"] = json!([]);
    }
    let Some(entries) = metadata["managedFields"].as_array_mut() else {
        return;
    };
    let subresource = if manager.status {
        json!("status")
    } else {
        Value::Null
    };
    let ours = |entry: &Value| {
        entry["manager"] == manager.name
            && entry["apiVersion"] == manager.api_version
            && entry["subresource"] == subresource
    };
    let at = entries.iter().position(ours).unwrap_or_else(|| {
        let mut entry = json!({
            "manager": manager.name, "operation": "Update", "apiVersion": manager.api_version,
            "fieldsType": "FieldsV1", "fieldsV1": {},
        });
        if manager.status {
            entry["subresource"] = subresource.clone();
        }
        entries.push(entry);
        entries.len() - 1
    });
    entries[at]["time"] = now.into();
    super::patch::merge(&mut entries[at]["fieldsV1"], &set);
}

fn fields<'a>(value: &'a Value, path: &mut Vec<&'a str>) -> Value {
    let mut set = Map::new();
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                path.push(name);
                let owned = !matches!(
                    path[..],
                    ["kind" | "apiVersion"]
                        | [
                            "metadata",
                            "name"
                                | "namespace"
                                | "uid"
                                | "resourceVersion"
                                | "creationTimestamp"
                                | "managedFields"
                        ]
                );
                if owned {
                    set.insert(format!("f:{name}"), fields(value, path));
                }
                path.pop();
            }
        }
        Value::Array(items) => {
            if let Some(key) = merge_key(path) {
                for item in items {
                    let name = format!("k:{}", json!({key: item[key]}));
                    set.insert(name, fields(item, &mut Vec::new()));
                }
            }
        }
        _ => {}
    }
    Value::Object(set)
}
