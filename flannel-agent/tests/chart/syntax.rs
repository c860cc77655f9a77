//! The part of Go's template language that the chart uses, as a tree. What is not known is an error: a template that passes here
//! means the same to Helm.

use regex::Regex;

/// A piece of a template.
#[derive(Clone, Debug)]
pub(crate) enum Node {
    Text(String),
    /// `{{ pipeline }}`: its value is written.
    Write(Expr),
    /// `{{ $name := pipeline }}`
    Set(String, Expr),
    If(Vec<(Expr, Vec<Node>)>, Vec<Node>),
    With(Expr, Vec<Node>),
    Range(Expr, Vec<Node>),
    Define(String, Vec<Node>),
}

/// An expression.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Expr {
    Text(String),
    Number(i64),
    /// `.a.b`, or `.` alone.
    Field(Vec<String>),
    /// `$name`
    Variable(String),
    Call(String, Vec<Expr>),
}

/// A word of an action.
#[derive(Clone, Debug, PartialEq)]
enum Word {
    Open,
    Close,
    Pipe,
    Assign,
    Text(String),
    Number(i64),
    Field(Vec<String>),
    Variable(String),
    Name(String),
}

/// Text and actions, with what trim markers take away taken away.
enum Piece {
    Text(String),
    Action(String),
}

/// Parses a template.
pub(crate) fn parse(source: &str) -> Result<Vec<Node>, String> {
    let mut pieces = pieces(source)?.into_iter();
    let (nodes, end) = block(&mut pieces)?;
    match end {
        None => Ok(nodes),
        Some(word) => Err(format!("{word:?} ends nothing")),
    }
}

fn pieces(source: &str) -> Result<Vec<Piece>, String> {
    let mut found = Vec::new();
    let mut rest = source;
    let mut trim = false;
    while let Some((text, behind)) = rest.split_once("{{") {
        let (action, next) = behind
            .split_once("}}")
            .ok_or_else(|| format!("an action has no end: {behind:.40}"))?;
        let text = if trim { text.trim_start() } else { text };
        let (action, before) = match action.strip_prefix("- ") {
            Some(action) => (action, true),
            None => (action, false),
        };
        // A comment may touch its markers.
        let (action, before) = match action.strip_prefix("-/*") {
            Some(comment) => (format!("/*{comment}"), true),
            None => (action.to_owned(), before),
        };
        let text = if before { text.trim_end() } else { text };
        found.push(Piece::Text(text.to_owned()));
        let (action, after) = match action.strip_suffix(" -") {
            Some(action) => (action.to_owned(), true),
            None => match action.strip_suffix("*/-") {
                Some(comment) => (format!("{comment}*/"), true),
                None => (action, false),
            },
        };
        trim = after;
        let action = action.trim();
        if !(action.starts_with("/*") && action.ends_with("*/")) {
            found.push(Piece::Action(action.to_owned()));
        }
        rest = next;
    }
    let rest = if trim { rest.trim_start() } else { rest };
    found.push(Piece::Text(rest.to_owned()));
    Ok(found)
}

/// What ended a block: `end`, `else`, or `else if` with its condition.
#[derive(Debug)]
enum End {
    Close,
    Else,
    ElseIf(Expr),
}

fn block(pieces: &mut impl Iterator<Item = Piece>) -> Result<(Vec<Node>, Option<End>), String> {
    let mut nodes = Vec::new();
    while let Some(piece) = pieces.next() {
        let action = match piece {
            Piece::Text(text) => {
                nodes.push(Node::Text(text));
                continue;
            }
            Piece::Action(action) => action,
        };
        let (keyword, rest) = action.split_once(' ').unwrap_or((&action, ""));
        let node = match keyword {
            "end" if rest.is_empty() => return Ok((nodes, Some(End::Close))),
            "else" if rest.is_empty() => return Ok((nodes, Some(End::Else))),
            "else" => {
                let condition = rest
                    .strip_prefix("if ")
                    .ok_or_else(|| format!("else {rest}: unknown"))?;
                return Ok((nodes, Some(End::ElseIf(expression(condition)?))));
            }
            "if" => conditions(expression(rest)?, pieces)?,
            "with" => Node::With(expression(rest)?, body(pieces)?),
            "range" => Node::Range(expression(rest)?, body(pieces)?),
            "define" => Node::Define(quoted(rest)?, body(pieces)?),
            _ => statement(&action)?,
        };
        nodes.push(node);
    }
    Ok((nodes, None))
}

fn conditions(first: Expr, pieces: &mut impl Iterator<Item = Piece>) -> Result<Node, String> {
    let mut arms = Vec::new();
    let mut condition = first;
    loop {
        let (nodes, end) = block(pieces)?;
        arms.push((condition, nodes));
        match end {
            Some(End::Close) => return Ok(Node::If(arms, Vec::new())),
            Some(End::Else) => return Ok(Node::If(arms, body(pieces)?)),
            Some(End::ElseIf(next)) => condition = next,
            None => return Err("an if has no end".to_owned()),
        }
    }
}

/// A block that nothing but `end` may end.
fn body(pieces: &mut impl Iterator<Item = Piece>) -> Result<Vec<Node>, String> {
    match block(pieces)? {
        (nodes, Some(End::Close)) => Ok(nodes),
        (_, end) => Err(format!("a block ends with {end:?}")),
    }
}

fn quoted(text: &str) -> Result<String, String> {
    match words(text)?.as_slice() {
        [Word::Text(text)] => Ok(text.clone()),
        other => Err(format!("a name in quotes, not {other:?}")),
    }
}

fn statement(action: &str) -> Result<Node, String> {
    let all = words(action)?;
    match all.as_slice() {
        [Word::Variable(name), Word::Assign, rest @ ..] => {
            Ok(Node::Set(name.clone(), pipeline(rest)?))
        }
        rest => Ok(Node::Write(pipeline(rest)?)),
    }
}

fn expression(text: &str) -> Result<Expr, String> {
    pipeline(&words(text)?)
}

/// Commands, each of which is the last argument of the next.
fn pipeline(words: &[Word]) -> Result<Expr, String> {
    let mut depth = 0_u32;
    let mut commands: Vec<Vec<Word>> = vec![Vec::new()];
    for word in words {
        match word {
            Word::Open => depth += 1,
            Word::Close => depth = depth.checked_sub(1).ok_or("a ) too many")?,
            _ => {}
        }
        match (word, depth, commands.last_mut()) {
            (Word::Pipe, 0, _) => commands.push(Vec::new()),
            (word, _, Some(command)) => command.push(word.clone()),
            (_, _, None) => {}
        }
    }
    let mut value = None;
    for words in &commands {
        let mut arguments = arguments(words)?;
        let first = if arguments.is_empty() {
            return Err("an empty command".to_owned());
        } else {
            arguments.remove(0)
        };
        value = Some(match (first, value) {
            (Expr::Call(name, none), given) if none.is_empty() => {
                arguments.extend(given);
                Expr::Call(name, arguments)
            }
            (value, None) if arguments.is_empty() => value,
            (other, _) => return Err(format!("{other:?} cannot be called")),
        });
    }
    value.ok_or_else(|| "an empty pipeline".to_owned())
}

/// The words of a command, each as an expression; names are calls without arguments.
fn arguments(words: &[Word]) -> Result<Vec<Expr>, String> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(word) = words.get(at) {
        at += 1;
        found.push(match word {
            Word::Text(text) => Expr::Text(text.clone()),
            Word::Number(number) => Expr::Number(*number),
            Word::Field(path) => Expr::Field(path.clone()),
            Word::Variable(name) => Expr::Variable(name.clone()),
            Word::Name(name) => Expr::Call(name.clone(), Vec::new()),
            Word::Open => {
                let start = at;
                let mut depth = 1;
                while depth > 0 {
                    match words.get(at).ok_or("a ( has no )")? {
                        Word::Open => depth += 1,
                        Word::Close => depth -= 1,
                        _ => {}
                    }
                    at += 1;
                }
                pipeline(&words[start..at - 1])?
            }
            other => return Err(format!("{other:?} in a command")),
        });
    }
    Ok(found)
}

fn words(text: &str) -> Result<Vec<Word>, String> {
    let pattern = Regex::new(concat!(
        r#"^(?:"(?P<text>[^"\\]*)"|(?P<number>[0-9]+)|(?P<field>\.[A-Za-z_][A-Za-z0-9_.]*|\.)"#,
        r"|\$(?P<variable>[a-z][A-Za-z]*)|(?P<name>[a-z][A-Za-z]*)|(?P<sign>:=|\||\(|\)))"
    ))
    .map_err(|error| error.to_string())?;
    let mut rest = text.trim();
    let mut found = Vec::new();
    while !rest.is_empty() {
        let word = pattern
            .captures(rest)
            .ok_or_else(|| format!("not understood: {rest}"))?;
        let get = |name: &str| word.name(name).map(|found| found.as_str().to_owned());
        found.push(if let Some(text) = get("text") {
            Word::Text(text)
        } else if let Some(number) = get("number") {
            Word::Number(
                number
                    .parse()
                    .map_err(|_| format!("{number} is too large"))?,
            )
        } else if let Some(field) = get("field") {
            let parts = field.split('.').filter(|part| !part.is_empty());
            Word::Field(parts.map(str::to_owned).collect())
        } else if let Some(name) = get("variable") {
            Word::Variable(name)
        } else if let Some(name) = get("name") {
            Word::Name(name)
        } else {
            match get("sign").as_deref() {
                Some(":=") => Word::Assign,
                Some("|") => Word::Pipe,
                Some("(") => Word::Open,
                _ => Word::Close,
            }
        });
        rest = rest[word[0].len()..].trim_start();
    }
    Ok(found)
}
