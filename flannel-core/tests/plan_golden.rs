//! Golden triples: `tests/plan/<case>/have.json` (observed) and `want.json` (desired) must give `ops.json` (the plan).
//!
//! A bug report becomes a directory with two files. `UPDATE_GOLDEN=1 cargo test -p flannel-core --test plan_golden` writes
//! the third; read it before committing it, the test cannot know what is right.

use std::{
    fs,
    path::{Path, PathBuf},
};

use flannel_core::plan::{Desired, Observed, Plan, plan};
use serde::de::DeserializeOwned;

#[test]
fn golden_triples() {
    let update = std::env::var_os("UPDATE_GOLDEN").is_some_and(|value| value == "1");
    let cases = cases();
    assert!(!cases.is_empty(), "no cases");
    let mut wrong = Vec::new();
    for case in &cases {
        let have: Observed = read(&case.join("have.json"));
        let want: Desired = read(&case.join("want.json"));
        let planned = plan(&want, &have);
        let file = case.join("ops.json");
        if update {
            let text = serde_json::to_string_pretty(&planned).expect("a plan is JSON");
            fs::write(&file, text + "\n").expect("the case is writable");
        } else if read::<Plan>(&file) != planned {
            wrong.push(format!("{}: {}", case.display(), describe(&planned)));
        }
    }
    assert!(
        wrong.is_empty(),
        "other plans than in ops.json:\n{}",
        wrong.join("\n")
    );
}

// What the files are read as is what the plan is made from: a misspelt optional field would be left out silently.
#[test]
fn files_say_nothing_that_is_not_read() {
    for case in cases() {
        let have: Observed = read(&case.join("have.json"));
        let want: Desired = read(&case.join("want.json"));
        assert_eq!(
            serde_json::to_value(have).expect("an observation is JSON"),
            read::<serde_json::Value>(&case.join("have.json")),
            "{}",
            case.display()
        );
        assert_eq!(
            serde_json::to_value(want).expect("a wish is JSON"),
            read::<serde_json::Value>(&case.join("want.json")),
            "{}",
            case.display()
        );
    }
}

fn cases() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plan");
    let mut cases: Vec<PathBuf> = fs::read_dir(&root)
        .unwrap_or_else(|error| panic!("{}: {error}", root.display()))
        .map(|entry| entry.expect("a readable directory").path())
        .filter(|path| path.is_dir())
        .collect();
    cases.sort();
    cases
}

fn read<T: DeserializeOwned>(path: &Path) -> T {
    let text =
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn describe(plan: &Plan) -> String {
    let ops = plan.ops.iter().map(|op| format!("\n  {op}"));
    let problems = plan
        .problems
        .iter()
        .map(|problem| format!("\n  problem: {problem}"));
    ops.chain(problems).collect()
}
