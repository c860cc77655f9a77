//! Creating, replacing, patching and deleting objects.

use super::clock;
use super::events;
use super::managed::{self, Manager};
use super::patch;
use super::refusal::Refusal;
use super::request::Attributes;
use super::store::{Key, Kind, Object, Store};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Number of the next generated name.
static NEXT: AtomicU32 = AtomicU32::new(1);

/// How a patch is to be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PatchKind {
    Merge,
    Strategic,
}

impl PatchKind {
    /// By `Content-Type`.
    pub(crate) fn of(content_type: &str) -> Result<PatchKind, Refusal> {
        match content_type.split(';').next().unwrap_or_default().trim() {
            "application/merge-patch+json" => Ok(PatchKind::Merge),
            "application/strategic-merge-patch+json" => Ok(PatchKind::Strategic),
            _ => Err(Refusal::unsupported_media_type()),
        }
    }
}

/// Adds an object.
pub(crate) fn create(
    store: &mut Store,
    kind: Kind,
    namespace: &str,
    manager: &str,
    object: Value,
) -> Result<Arc<Object>, Refusal> {
    let new_event = kind == Kind::NewEvent;
    let mut object = if new_event {
        events::to_core(object)
    } else {
        object
    };
    if !object["metadata"].is_object() {
        return Err(Refusal::bad_request("the object has no metadata"));
    }
    let own = object["metadata"]["namespace"].as_str().unwrap_or_default();
    if kind.namespaced() && !own.is_empty() && own != namespace {
        return Err(Refusal::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    if kind.namespaced() {
        object["metadata"]["namespace"] = namespace.into();
    }
    let touched = object.clone();
    let now = clock::now();
    let name = name_of(&mut object["metadata"], kind)?;
    let key: Key = (namespace.to_owned(), name.clone());
    if store.get(kind, &key).is_some() {
        return Err(Refusal::already_exists(kind, &name));
    }
    if object["metadata"]["resourceVersion"].is_string() {
        return Err(Refusal::bad_request(
            "resourceVersion should not be set on objects to be created",
        ));
    }
    object["metadata"]["uid"] = uid().into();
    object["metadata"]["creationTimestamp"] = now.as_str().into();
    match kind {
        Kind::Node => complete_node(&mut object),
        Kind::Pod => complete_pod(&mut object),
        Kind::Event | Kind::NewEvent => {
            events::complete(&mut object);
            events::validate(&object, new_event)?;
        }
    }
    tidy(&mut object)?;
    let manager = Manager {
        name: manager,
        api_version: kind.api_version(),
        status: false,
    };
    managed::record(&mut object, &manager, &touched, &now);
    Ok(store.put(kind, object))
}

/// Patches an object.
pub(crate) fn patch(
    store: &mut Store,
    asked: &Attributes,
    manager: &str,
    how: PatchKind,
    patch: Value,
) -> Result<Arc<Object>, Refusal> {
    let old = find(store, asked)?;
    let mut new = old.value();
    let patch = if asked.kind == Kind::NewEvent {
        events::to_core(patch)
    } else {
        patch
    };
    if !patch.is_object() {
        return Err(Refusal::bad_request("a patch must be an object"));
    }
    match how {
        PatchKind::Merge => patch::merge(&mut new, &patch),
        PatchKind::Strategic => patch::strategic(&mut new, &patch),
    }
    finish(store, asked, manager, &old, new, &patch)
}

/// Replaces an object.
pub(crate) fn replace(
    store: &mut Store,
    asked: &Attributes,
    manager: &str,
    object: Value,
) -> Result<Arc<Object>, Refusal> {
    let old = find(store, asked)?;
    let mut new = if asked.kind == Kind::NewEvent {
        events::to_core(object)
    } else {
        object
    };
    if new["metadata"]["name"] != asked.name.as_str() {
        return Err(Refusal::bad_request(
            "the name of the object does not match the name on the URL",
        ));
    }
    let had = old.value();
    for name in ["uid", "resourceVersion"] {
        // Without one the object is replaced whatever its version is.
        if new["metadata"][name].as_str().is_none_or(str::is_empty) {
            new["metadata"][name] = had["metadata"][name].clone();
        }
    }
    let touched = new.clone();
    finish(store, asked, manager, &old, new, &touched)
}

/// Removes an object.
pub(crate) fn delete(
    store: &mut Store,
    asked: &Attributes,
    options: &Value,
) -> Result<Arc<Object>, Refusal> {
    let old = find(store, asked)?.value();
    let wanted = &options["preconditions"];
    for (name, shown) in [("uid", "UID"), ("resourceVersion", "ResourceVersion")] {
        precondition(asked, shown, &wanted[name], &old["metadata"][name])?;
    }
    let key = (asked.namespace.clone(), asked.name.clone());
    store
        .delete(asked.kind, &key)
        .ok_or_else(|| Refusal::not_found(asked.kind, &asked.name))
}

/// Finds what a request is about.
pub(crate) fn find(store: &Store, asked: &Attributes) -> Result<Arc<Object>, Refusal> {
    let key = (asked.namespace.clone(), asked.name.clone());
    let object = store.get(asked.kind, &key).cloned();
    object.ok_or_else(|| Refusal::not_found(asked.kind, &asked.name))
}

/// Stores the new version of an object, as far as the request may change it. One that changes nothing makes no version.
fn finish(
    store: &mut Store,
    asked: &Attributes,
    manager: &str,
    old: &Object,
    mut new: Value,
    touched: &Value,
) -> Result<Arc<Object>, Refusal> {
    let had = old.value();
    let (before, after) = (&had["metadata"], &new["metadata"]);
    precondition(asked, "UID", &after["uid"], &before["uid"])?;
    if after["resourceVersion"] != before["resourceVersion"] {
        return Err(Refusal::conflict(asked.kind, &asked.name));
    }
    for name in [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "managedFields",
    ] {
        put(&mut new["metadata"], name, &before[name]);
    }
    if asked.kind.has_status() {
        let kept = if asked.status { "spec" } else { "status" };
        put(&mut new, kept, &had[kept]);
    }
    for name in ["kind", "apiVersion"] {
        put(&mut new, name, &Value::Null);
    }
    tidy(&mut new)?;
    if asked.kind == Kind::Node {
        validate_node(&asked.name, &had, &new)?;
    }
    if new == had {
        let same = store.get(asked.kind, &old.key).cloned();
        return same.ok_or_else(|| Refusal::not_found(asked.kind, &asked.name));
    }
    let manager = Manager {
        name: manager,
        api_version: asked.kind.api_version(),
        status: asked.status,
    };
    managed::record(&mut new, &manager, touched, &clock::now());
    Ok(store.put(asked.kind, new))
}

fn precondition(
    asked: &Attributes,
    shown: &str,
    wanted: &Value,
    have: &Value,
) -> Result<(), Refusal> {
    let Some(wanted) = wanted.as_str() else {
        return Ok(());
    };
    let have = have.as_str().unwrap_or_default();
    if wanted == have {
        return Ok(());
    }
    let why = format!(
        "Precondition failed: {shown} in precondition: {wanted}, {shown} in object meta: {have}"
    );
    Err(Refusal::conflict_because(asked.kind, &asked.name, &why))
}

/// A node's subnets, once given, stay for the life of the object.
fn validate_node(name: &str, old: &Value, new: &Value) -> Result<(), Refusal> {
    let had = &old["spec"]["podCIDRs"];
    if had.is_array() && *had != new["spec"]["podCIDRs"] {
        let why = "Forbidden: node updates may not change podCIDR except from \"\" to valid";
        return Err(Refusal::invalid(
            "Node",
            name,
            &[("spec.podCIDRs", why.into())],
        ));
    }
    Ok(())
}

/// Checks what the types of the metadata ask for, and drops empty maps as the real server's serializer does.
fn tidy(object: &mut Value) -> Result<(), Refusal> {
    for name in ["annotations", "labels"] {
        let Some(map) = object["metadata"].get(name) else {
            continue;
        };
        let Some(map) = map.as_object() else {
            return Err(Refusal::bad_request(&format!(
                "metadata.{name} is not a map"
            )));
        };
        if let Some((key, value)) = map.iter().find(|(_, value)| !value.is_string()) {
            let message = format!(
                "json: cannot unmarshal {value} into Go struct field ObjectMeta.metadata.{name} of type string ({key})"
            );
            return Err(Refusal::bad_request(&message));
        }
        if map.is_empty() {
            put(&mut object["metadata"], name, &Value::Null);
        }
    }
    Ok(())
}

/// Sets a field, or removes it with `null`.
fn put(object: &mut Value, name: &str, value: &Value) {
    let Some(object) = object.as_object_mut() else {
        return;
    };
    if value.is_null() {
        object.remove(name);
    } else {
        object.insert(name.to_owned(), value.clone());
    }
}

fn name_of(metadata: &mut Value, kind: Kind) -> Result<String, Refusal> {
    if metadata["name"].as_str().is_none_or(str::is_empty) {
        let Some(prefix) = metadata["generateName"].as_str() else {
            let cause = (
                "metadata.name",
                "Required value: name or generateName is required".into(),
            );
            return Err(Refusal::invalid(kind.name(), "", &[cause]));
        };
        let name = format!("{prefix}{:05x}", NEXT.fetch_add(1, Ordering::Relaxed));
        metadata["name"] = name.into();
    }
    Ok(metadata["name"].as_str().unwrap_or_default().to_owned())
}

/// What a server without kubelet adds to a node.
fn complete_node(node: &mut Value) {
    let spec = &mut node["spec"];
    if !spec.is_object() {
        *spec = json!({});
    }
    match (spec["podCIDR"].clone(), spec["podCIDRs"].clone()) {
        (Value::String(one), Value::Null) => spec["podCIDRs"] = json!([one]),
        (Value::Null, Value::Array(all)) if !all.is_empty() => spec["podCIDR"] = all[0].clone(),
        _ => {}
    }
    for name in ["podCIDR", "podCIDRs"] {
        if spec[name].is_null() {
            put(spec, name, &Value::Null);
        }
    }
    if spec.get("taints").is_none() {
        spec["taints"] = json!([{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}]);
    }
    let status = &mut node["status"];
    if !status.is_object() {
        *status = json!({});
    }
    if status.get("daemonEndpoints").is_none() {
        status["daemonEndpoints"] = json!({"kubeletEndpoint": {"Port": 0}});
    }
    if status.get("nodeInfo").is_none() {
        status["nodeInfo"] = json!({
            "machineID": "", "systemUUID": "", "bootID": "", "kernelVersion": "", "osImage": "",
            "containerRuntimeVersion": "", "kubeletVersion": "", "kubeProxyVersion": "", "operatingSystem": "",
            "architecture": "",
        });
    }
}

fn complete_pod(pod: &mut Value) {
    for (name, value) in [("spec", json!({})), ("status", json!({"phase": "Pending"}))] {
        if !pod[name].is_object() {
            pod[name] = value;
        }
    }
}

pub(crate) fn uid() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/uuid");
    text.expect("the kernel's random uuid").trim().to_owned()
}
