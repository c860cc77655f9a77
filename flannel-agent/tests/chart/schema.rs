//! values.schema.json, which Helm holds values against before it renders.

use regex::Regex;
use serde_json::Value;

use crate::manifest_rig::read;

/// The words of JSON Schema that the file uses and this module understands.
const WORDS: [&str; 10] = [
    "$schema",
    "additionalProperties",
    "enum",
    "items",
    "maximum",
    "minimum",
    "pattern",
    "properties",
    "title",
    "type",
];

/// The schema.
#[track_caller]
pub(crate) fn schema() -> Value {
    serde_json::from_str(&read("deploy/chart/flannel-ebpf/values.schema.json")).expect("JSON")
}

/// Finds the first thing that a value should not be.
pub(crate) fn check(at: &str, schema: &Value, value: &Value) -> Result<(), String> {
    let words = schema.as_object().ok_or("a schema is a map")?;
    for word in words.keys() {
        if !WORDS.contains(&word.as_str()) {
            return Err(format!("{at}: {word} is not known here"));
        }
    }
    // Helm drops what is null.
    if value.is_null() {
        return Ok(());
    }
    let types = match &schema["type"] {
        Value::Array(types) => types.clone(),
        one => vec![one.clone()],
    };
    let is = |name: &Value| match name.as_str() {
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_i64(),
        _ => false,
    };
    if !types.iter().any(is) {
        return Err(format!("{at}: {value} is not {types:?}"));
    }
    if let Some(known) = schema["enum"].as_array()
        && !known.contains(value)
    {
        return Err(format!("{at}: {value} is not one of {known:?}"));
    }
    if let Some(pattern) = schema["pattern"].as_str() {
        let pattern = Regex::new(pattern).map_err(|error| error.to_string())?;
        if !pattern.is_match(value.as_str().unwrap_or_default()) {
            return Err(format!("{at}: {value} is not like {pattern}"));
        }
    }
    let low = schema["minimum"].as_i64().unwrap_or(i64::MIN);
    let high = schema["maximum"].as_i64().unwrap_or(i64::MAX);
    if let Some(number) = value.as_i64()
        && !(low..=high).contains(&number)
    {
        return Err(format!("{at}: {number} is not in {low}..={high}"));
    }
    for (index, one) in value.as_array().into_iter().flatten().enumerate() {
        check(&format!("{at}/{index}"), &schema["items"], one)?;
    }
    for (name, one) in value.as_object().into_iter().flatten() {
        let at = format!("{at}/{name}");
        match &schema["properties"][name] {
            Value::Null if schema["additionalProperties"] == false => {
                return Err(format!("{at}: there is no such value"));
            }
            Value::Null => {}
            schema => check(&at, schema, one)?,
        }
    }
    Ok(())
}

/// Collects what the schema has and the values have not.
pub(crate) fn compare(at: &str, schema: &Value, values: &Value, missing: &mut Vec<String>) {
    for (name, schema) in schema["properties"].as_object().into_iter().flatten() {
        let at = format!("{at}/{name}");
        match values.get(name) {
            Some(value) => compare(&at, schema, value, missing),
            None => missing.push(at),
        }
    }
}
