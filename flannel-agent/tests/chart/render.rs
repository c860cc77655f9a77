//! Executes templates, as Helm does, as far as the chart goes. A field that values.yaml does not have is an error, and so is a number
//! that is written without `int`: Go writes 16777215 as 1.6777215e+07.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::syntax::{Expr, Node, parse};

/// Named templates and what every template is given.
pub(crate) struct Renderer {
    defined: BTreeMap<String, Vec<Node>>,
    root: Value,
}

/// Where execution is: the value of the dot, and variables.
struct Scope {
    dot: Value,
    variables: BTreeMap<String, Value>,
}

impl Renderer {
    /// For values, a chart's description and the namespace of the release.
    pub(crate) fn new(values: &Value, chart: &Value, namespace: &str) -> Self {
        Self {
            defined: BTreeMap::new(),
            root: json!({
                "Values": values,
                "Chart": {
                    "Name": chart["name"],
                    "Version": chart["version"],
                    "AppVersion": chart["appVersion"],
                },
                "Release": {"Name": "flannel", "Namespace": namespace, "Service": "Helm"},
            }),
        }
    }

    /// Reads definitions.
    pub(crate) fn define(&mut self, source: &str) -> Result<(), String> {
        for node in parse(source)? {
            match node {
                Node::Define(name, body) => {
                    self.defined.insert(name, body);
                }
                Node::Text(text) if text.trim().is_empty() => {}
                other => return Err(format!("outside of a definition: {other:?}")),
            }
        }
        Ok(())
    }

    /// Renders a template.
    pub(crate) fn render(&self, source: &str) -> Result<String, String> {
        self.run(&parse(source)?, self.root.clone())
    }

    fn run(&self, nodes: &[Node], dot: Value) -> Result<String, String> {
        let mut scope = Scope {
            dot,
            variables: BTreeMap::new(),
        };
        let mut out = String::new();
        self.nodes(nodes, &mut scope, &mut out)?;
        Ok(out)
    }

    fn nodes(&self, nodes: &[Node], scope: &mut Scope, out: &mut String) -> Result<(), String> {
        for node in nodes {
            match node {
                Node::Text(text) => out.push_str(text),
                Node::Write(expr) => out.push_str(&written(&self.value(expr, scope)?)?),
                Node::Set(name, expr) => {
                    let value = self.value(expr, scope)?;
                    scope.variables.insert(name.clone(), value);
                }
                Node::If(arms, otherwise) => {
                    let mut chosen = otherwise;
                    for (condition, body) in arms {
                        if truth(&self.value(condition, scope)?) {
                            chosen = body;
                            break;
                        }
                    }
                    self.nodes(chosen, scope, out)?;
                }
                Node::With(expr, body) => {
                    let value = self.value(expr, scope)?;
                    if truth(&value) {
                        self.at(value, body, scope, out)?;
                    }
                }
                Node::Range(expr, body) => match self.value(expr, scope)? {
                    Value::Array(all) => {
                        for value in all {
                            self.at(value, body, scope, out)?;
                        }
                    }
                    other => return Err(format!("range over {other}")),
                },
                Node::Define(name, _) => return Err(format!("{name}: defined in a template")),
            }
        }
        Ok(())
    }

    /// A body with another dot.
    fn at(
        &self,
        dot: Value,
        body: &[Node],
        scope: &mut Scope,
        out: &mut String,
    ) -> Result<(), String> {
        let outer = std::mem::replace(&mut scope.dot, dot);
        let done = self.nodes(body, scope, out);
        scope.dot = outer;
        done
    }

    fn value(&self, expr: &Expr, scope: &Scope) -> Result<Value, String> {
        match expr {
            Expr::Text(text) => Ok(json!(text)),
            Expr::Number(number) => Ok(json!(number)),
            Expr::Variable(name) => {
                let value = scope.variables.get(name);
                value.cloned().ok_or_else(|| format!("no variable ${name}"))
            }
            Expr::Field(path) => {
                let mut value = &scope.dot;
                for name in path {
                    value = value
                        .get(name)
                        .ok_or_else(|| format!("no field .{}", path.join(".")))?;
                }
                Ok(value.clone())
            }
            Expr::Call(name, arguments) => {
                let values: Vec<Value> = arguments
                    .iter()
                    .map(|argument| self.value(argument, scope))
                    .collect::<Result<_, _>>()?;
                self.call(name, &values)
            }
        }
    }

    fn call(&self, name: &str, arguments: &[Value]) -> Result<Value, String> {
        let wrong = || format!("{name} {arguments:?}: not understood");
        Ok(match (name, arguments) {
            ("include", [Value::String(name), dot]) => {
                let body = self.defined.get(name);
                let body = body.ok_or_else(|| format!("no template {name}"))?;
                json!(self.run(body, dot.clone())?)
            }
            ("fail", [Value::String(message)]) => return Err(message.clone()),
            ("quote", [value]) => json!(format!("\"{}\"", plain(&written(value)?)?)),
            ("nindent", [Value::Number(depth), Value::String(text)]) => {
                let depth = depth.as_u64().and_then(|depth| usize::try_from(depth).ok());
                let pad = " ".repeat(depth.ok_or_else(wrong)?);
                let lines: Vec<String> = text
                    .split('\n')
                    .map(|line| format!("{pad}{line}"))
                    .collect();
                json!(format!("\n{}", lines.join("\n")))
            }
            ("toYaml", [value]) => {
                let text = serde_saphyr::to_string(value).map_err(|error| error.to_string())?;
                json!(text.trim_end_matches('\n'))
            }
            ("int", [Value::Number(number)]) => json!({"int": number.as_i64().ok_or_else(wrong)?}),
            ("printf", [Value::String(format), Value::String(text)])
                if format.matches('%').count() == 1 && format.contains("%s") =>
            {
                json!(format.replace("%s", text))
            }
            ("printf", [Value::String(format), number])
                if format.matches('%').count() == 1 && format.contains("%d") =>
            {
                json!(format.replace("%d", &integer(number).ok_or_else(wrong)?.to_string()))
            }
            ("ne", [Value::String(left), Value::String(right)]) => json!(left != right),
            ("not", [value]) => json!(!truth(value)),
            ("or", [first, .., last]) => {
                let all = std::iter::once(first).chain(&arguments[1..]);
                all.into_iter()
                    .find(|value| truth(value))
                    .unwrap_or(last)
                    .clone()
            }
            _ => return Err(wrong()),
        })
    }
}

/// What `int` has made.
fn integer(value: &Value) -> Option<i64> {
    value.get("int")?.as_i64()
}

/// Text that is the same in quotes.
fn plain(text: &str) -> Result<&str, String> {
    if text.contains(['"', '\\', '\n']) {
        return Err(format!("{text:?} has to be escaped"));
    }
    Ok(text)
}

fn written(value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Bool(value) => Ok(value.to_string()),
        other => match integer(other) {
            Some(number) => Ok(number.to_string()),
            None => Err(format!(
                "{other} is written: text, a boolean or `int` may be"
            )),
        },
    }
}

/// What counts as true.
fn truth(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(value) => *value,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(all) => !all.is_empty(),
        Value::Object(all) => !all.is_empty(),
    }
}
