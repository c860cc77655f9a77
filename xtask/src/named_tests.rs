//! Tests that the documents name: a row that says where it is tested must not outlive its test.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

/// Where tests are. A name's first part is a file or a directory in one of these, or a crate.
const TESTS: [&str; 5] = [
    "flannel-agent/tests",
    "flannel-cni/tests",
    "flannel-core/tests",
    "flannel-testkit/tests",
    "bench/tests",
];
/// Where the tests of a crate are, by its name in paths.
const CRATES: [(&str, &str); 2] = [
    ("flannel_core", "flannel-core/src"),
    ("flannel_agent", "flannel-agent/src"),
];

/// Fails with the names in `docs/*.md` that no test has.
pub(crate) fn check(root: &Path) -> Result<()> {
    let mut sources: BTreeMap<String, String> = BTreeMap::new();
    let mut unknown = Vec::new();
    let mut named = 0;
    for document in files(&root.join("docs"), "md")? {
        let text = fs::read_to_string(&document)
            .with_context(|| format!("read {}", document.display()))?;
        for name in names(&text) {
            named += 1;
            let Some((first, rest)) = name.split_once("::") else {
                continue;
            };
            if !sources.contains_key(first) {
                sources.insert(first.to_owned(), source_of(root, first)?);
            }
            let source = sources.get(first).map_or("", String::as_str);
            let test = rest.rsplit("::").next().unwrap_or(rest);
            if !source.contains(&format!("fn {test}()")) {
                unknown.push(format!("{}: {name}", document.display()));
            }
        }
    }
    if !unknown.is_empty() {
        bail!("no such test: {}", unknown.join("; "));
    }
    if named == 0 {
        bail!("docs/*.md name no test at all: was the way of writing them changed?");
    }
    Ok(())
}

/// Paths in backquotes: `target::module::test`, in small letters.
fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2).filter(|quoted| {
        quoted.contains("::")
            && quoted
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_' || c == ':')
    })
}

/// Everything below a test target, or a crate.
fn source_of(root: &Path, first: &str) -> Result<String> {
    let mut paths = Vec::new();
    if let Some((_, place)) = CRATES.iter().find(|(name, _)| *name == first) {
        paths.extend(files(&root.join(place), "rs")?);
    }
    for place in TESTS {
        let file = root.join(place).join(format!("{first}.rs"));
        if !file.exists() {
            continue;
        }
        paths.push(file);
        let modules = root.join(place).join(first);
        if modules.is_dir() {
            paths.extend(files(&modules, "rs")?);
        }
    }
    let mut all = String::new();
    for path in paths {
        all += &fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    }
    Ok(all)
}

/// All files with the extension, in directories below too.
fn files(dir: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path, extension)?);
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_are_names() {
        let text = "see `netns_repair::mends` and `FLANNEL_MTU`, not `Some::Thing` or netns::this; `a b::c`";
        assert_eq!(names(text).collect::<Vec<_>>(), ["netns_repair::mends"]);
    }

    #[test]
    fn a_missing_test_is_found() {
        let root = tempdir();
        fs::create_dir_all(root.join("docs")).expect("mkdir");
        fs::create_dir_all(root.join("flannel-agent/tests/one")).expect("mkdir");
        fs::write(root.join("flannel-agent/tests/one.rs"), "fn here() {}").expect("write");
        fs::write(root.join("flannel-agent/tests/one/two.rs"), "fn there() {}").expect("write");
        let document = root.join("docs/a.md");
        fs::write(&document, "`one::here`, `one::two::there`").expect("write");
        check(&root).expect("both are there");
        fs::write(&document, "`one::here`, `one::gone`, `none::here`").expect("write");
        let error = check(&root).expect_err("two are not").to_string();
        assert!(error.contains("one::gone") && error.contains("none::here"));
        fs::write(&document, "nothing").expect("write");
        check(&root).expect_err("none named");
        fs::remove_dir_all(root).expect("clean up");
    }

    fn tempdir() -> PathBuf {
        let dir = std::env::temp_dir().join(format!("named-tests-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("mkdir");
        dir
    }
}
