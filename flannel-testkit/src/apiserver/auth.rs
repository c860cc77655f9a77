//! Who asks, and what he may: tokens, client certificates, and the rules of roles.

use super::refusal::Refusal;
use super::request::{Attributes, Target};
use serde::Deserialize;
use std::collections::BTreeMap;

/// A user with its groups, and what it may do besides reading `/version`, `/healthz` and the like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    pub name: String,
    pub groups: Vec<String>,
    pub rules: Vec<Rule>,
}

/// A rule of a ClusterRole, as in a manifest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Rule {
    pub api_groups: Vec<String>,
    /// Such as `nodes` and `nodes/status`; `*` is all.
    pub resources: Vec<String>,
    pub verbs: Vec<String>,
    /// Empty means every name.
    pub resource_names: Vec<String>,
}

/// The group whose members may do everything.
const MASTERS: &str = "system:masters";
/// Who proves nothing.
const ANONYMOUS: &str = "system:anonymous";

impl Rule {
    /// Reads the `rules` of a ClusterRole.
    pub fn of_role(role: &serde_json::Value) -> anyhow::Result<Vec<Rule>> {
        Ok(Vec::deserialize(&role["rules"])?)
    }

    /// A rule of the core group.
    pub fn core(resource: &str, verbs: &[&str]) -> Rule {
        Rule {
            api_groups: vec![String::new()],
            resources: vec![resource.into()],
            verbs: verbs.iter().map(|verb| (*verb).to_owned()).collect(),
            resource_names: Vec::new(),
        }
    }

    fn allows(&self, asked: &Attributes, group: &str) -> bool {
        let has =
            |list: &[String], value: &str| list.iter().any(|have| have == "*" || have == value);
        has(&self.verbs, asked.verb.as_str())
            && has(&self.api_groups, group)
            && has(&self.resources, &asked.resource_text())
            && (self.resource_names.is_empty() || self.resource_names.contains(&asked.name))
    }
}

impl User {
    /// One who may do everything.
    pub fn admin() -> User {
        User {
            name: "kubernetes-admin".into(),
            groups: vec![MASTERS.into()],
            rules: Vec::new(),
        }
    }

    /// A service account with the rules of the ClusterRole that it is bound to.
    pub fn service_account(namespace: &str, name: &str, rules: Vec<Rule>) -> User {
        User {
            name: format!("system:serviceaccount:{namespace}:{name}"),
            groups: vec![
                "system:serviceaccounts".into(),
                format!("system:serviceaccounts:{namespace}"),
            ],
            rules,
        }
    }

    fn anonymous() -> User {
        User {
            name: ANONYMOUS.into(),
            groups: vec!["system:unauthenticated".into()],
            rules: Vec::new(),
        }
    }
}

/// The users and how they prove who they are.
#[derive(Debug, Default)]
pub(crate) struct Users {
    known: BTreeMap<String, User>,
    tokens: BTreeMap<String, String>,
    certificates: BTreeMap<Vec<u8>, String>,
}

impl Users {
    pub(crate) fn add(&mut self, user: User) {
        self.known.insert(user.name.clone(), user);
    }

    pub(crate) fn set_rules(&mut self, user: &str, rules: Vec<Rule>) {
        if let Some(user) = self.known.get_mut(user) {
            user.rules = rules;
        }
    }

    pub(crate) fn add_token(&mut self, user: &str, token: String) {
        self.tokens.insert(token, user.to_owned());
    }

    pub(crate) fn drop_tokens(&mut self, user: &str) {
        self.tokens.retain(|_, owner| owner != user);
    }

    pub(crate) fn add_certificate(&mut self, user: &str, der: Vec<u8>) {
        self.certificates.insert(der, user.to_owned());
    }

    /// Who it is: by certificate, else by token; nobody in particular without either.
    pub(crate) fn identify(
        &self,
        certificate: Option<&[u8]>,
        bearer: Option<&str>,
    ) -> Result<User, Refusal> {
        let by_certificate = certificate.map(|der| self.certificates.get(der));
        let by_token = bearer.map(|token| self.tokens.get(token));
        let name = match (by_certificate, by_token) {
            (Some(Some(name)), _) | (_, Some(Some(name))) => name,
            (None, None) => return Ok(User::anonymous()),
            _ => return Err(Refusal::unauthorized()),
        };
        let user = self.known.get(name);
        user.cloned().ok_or_else(Refusal::unauthorized)
    }
}

/// Whether the user may; what nobody allowed is refused.
pub(crate) fn authorize(user: &User, target: &Target) -> Result<(), Refusal> {
    if user.groups.iter().any(|group| group == MASTERS) {
        return Ok(());
    }
    match target {
        Target::Path { path, verb } => {
            let public = ["/healthz", "/livez", "/readyz", "/version", "/version/"];
            // `system:discovery` is bound to everybody who has a name.
            let named = user.name != ANONYMOUS;
            let described = ["/api", "/apis", "/openapi"]
                .iter()
                .any(|root| path == root || path.starts_with(&format!("{root}/")));
            let discovery = named && described;
            if public.contains(&path.as_str()) || discovery {
                return Ok(());
            }
            let message = format!(
                "forbidden: User \"{}\" cannot {verb} path \"{path}\"",
                user.name
            );
            Err(Refusal::forbidden(&message, "", ""))
        }
        Target::Resource(asked) => {
            let group = asked.kind.group();
            if user.rules.iter().any(|rule| rule.allows(asked, group)) {
                return Ok(());
            }
            Err(refuse(user, asked, group))
        }
    }
}

fn refuse(user: &User, asked: &Attributes, group: &str) -> Refusal {
    let resource = asked.kind.qualified();
    let what = if asked.name.is_empty() {
        resource.to_owned()
    } else {
        format!("{resource} \"{}\"", asked.name)
    };
    let scope = if asked.namespace.is_empty() {
        "at the cluster scope".to_owned()
    } else {
        format!("in the namespace \"{}\"", asked.namespace)
    };
    let message = format!(
        "{what} is forbidden: User \"{}\" cannot {} resource \"{}\" in API group \"{group}\" {scope}",
        user.name,
        asked.verb.as_str(),
        asked.resource_text(),
    );
    Refusal::forbidden(&message, asked.kind.plural(), &asked.name)
}
