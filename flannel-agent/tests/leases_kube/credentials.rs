//! Credentials that change while the agent runs.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use flannel_agent::leases::Store;
use flannel_testkit::{
    apiserver::{ApiServer, WatchEnd, service_account},
    put_program,
};

use crate::{
    lease_rig::{Agent, Log, snapshot},
    rig::{Cluster, offer, until},
};

/// Files as the kubelet projects them into a pod: links into a directory that is swapped as a whole.
fn project(volume: &Path, api: &ApiServer, generation: u32) {
    let data = volume.join(format!("..{generation}"));
    fs::create_dir_all(&data).expect("a directory");
    fs::write(data.join("token"), api.token()).expect("token");
    fs::write(data.join("ca.crt"), api.ca()).expect("ca.crt");
    symlink(format!("..{generation}"), volume.join("..new")).expect("link");
    fs::rename(volume.join("..new"), volume.join("..data")).expect("swap");
    for name in ["token", "ca.crt"] {
        let link = volume.join(name);
        if !link.is_symlink() {
            symlink(format!("..data/{name}"), link).expect("link");
        }
    }
}

/// Makes the cluster's kubeconfig name files in place of what they hold.
fn use_files(cluster: &Cluster) -> PathBuf {
    let volume = cluster.dir.path().join("serviceaccount");
    let text = format!(
        "apiVersion: v1\n\
         kind: Config\n\
         clusters: [{{name: c, cluster: {{server: \"{}\", certificate-authority: serviceaccount/ca.crt}}}}]\n\
         users: [{{name: u, user: {{tokenFile: serviceaccount/token}}}}]\n\
         contexts: [{{name: x, context: {{cluster: c, user: u}}}}]\n\
         current-context: x\n",
        cluster.api.url()
    );
    fs::write(cluster.dir.path().join("kubeconfig"), text).expect("kubeconfig");
    project(&volume, &cluster.api, 1);
    volume
}

/// Lines with a warning about the API.
fn warnings(log: &Log) -> Vec<String> {
    let mut lines = log.lines(&["WARN"]);
    lines.extend(log.lines(&["ERROR"]));
    lines.retain(|line| !line.contains("restoring them"));
    lines
}

/// That changes are seen and written.
async fn works(cluster: &Cluster, agent: &mut Agent, host: u8) {
    cluster.peer("n2", host);
    cluster.set("n1", "backend-data", None);
    agent
        .until_leases(
            "a change",
            &snapshot(&[("10.5.1.0-24", 1), ("10.5.2.0-24", host)]),
        )
        .await;
    until("restored", || cluster.get("n1", "backend-data").is_some()).await;
    agent
        .until("well", |view| view.connected && view.last_error.is_none())
        .await;
}

#[tokio::test]
async fn a_token_that_was_rotated_is_read_again() {
    for file_first in [true, false] {
        let log = Log::capture();
        let cluster = Cluster::new(&[1, 2]);
        let volume = use_files(&cluster);
        let mut agent = cluster.agent(1).await;
        works(&cluster, &mut agent, 2).await;
        let before = cluster.api.token();
        let after = cluster.api.rotate_token(&service_account());
        if file_first {
            project(&volume, &cluster.api, 2);
        }
        cluster.api.end_watches(WatchEnd::Cut);
        if !file_first {
            log.until(&["WARN", "lease store unreachable", "Unauthorized"])
                .await;
            project(&volume, &cluster.api, 2);
        }
        works(&cluster, &mut agent, 3).await;
        let warnings = warnings(&log);
        assert!(warnings.len() <= 1, "{warnings:?}");
        let text = log.text();
        assert!(!text.contains(&before) && !text.contains(&after), "{text}");
        agent.stop().await;
    }
}

#[tokio::test]
async fn an_authority_that_was_replaced_is_read_again() {
    for with_files in [true, false] {
        let log = Log::capture();
        let cluster = Cluster::new(&[1, 2]);
        let volume = with_files.then(|| use_files(&cluster));
        let mut agent = cluster.agent(1).await;
        works(&cluster, &mut agent, 2).await;
        cluster.api.change_authority().expect("authority");
        log.until(&["WARN", "lease store unreachable"]).await;
        let token = cluster.api.rotate_token(&service_account());
        if let Some(volume) = volume {
            project(&volume, &cluster.api, 2);
        } else {
            let text = cluster.api.kubeconfig();
            fs::write(cluster.dir.path().join("kubeconfig"), text).expect("kubeconfig");
        }
        works(&cluster, &mut agent, 3).await;
        assert!(!log.text().contains(&token));
        agent.stop().await;
    }
}

#[tokio::test]
async fn a_kubeconfig_that_is_half_written_ends_nothing() {
    let cluster = Cluster::new(&[1, 2]);
    let mut agent = cluster.agent(1).await;
    works(&cluster, &mut agent, 2).await;
    let path = cluster.dir.path().join("kubeconfig");
    let log = Log::capture();
    let token = cluster.api.rotate_token(&service_account());
    let text = cluster.api.kubeconfig();
    let (half, _) = text.split_once("contexts:").expect("contexts");
    fs::write(&path, half.replace(&token, &format!("{token}, x: ["))).expect("kubeconfig");
    cluster.api.end_watches(WatchEnd::Cut);
    log.until(&["the credentials cannot be read again"]).await;
    let error = Store::open(&cluster.config(1)).await.expect_err("half");
    let error = error.chain();
    assert!(
        error.contains("at line 8 column") && !error.contains(&token),
        "{error}"
    );
    fs::write(&path, text).expect("kubeconfig");
    works(&cluster, &mut agent, 3).await;
    assert!(!log.text().contains(&token), "{}", log.text());
    agent.stop().await;
}

#[tokio::test]
async fn a_token_file_may_end_with_a_newline() {
    let cluster = Cluster::new(&[1]);
    let volume = use_files(&cluster);
    fs::write(volume.join("token"), format!("{}\n", cluster.api.token())).expect("token");
    let store = Store::open(&cluster.config(1)).await.expect("open");
    let list = store.list().await;
    assert!(list.is_ok(), "{list:?}");
    assert!(store.acquire(&offer(1)).await.is_ok());
}

#[tokio::test]
async fn what_an_exec_plugin_prints_is_in_no_error() {
    let cluster = Cluster::new(&[1]);
    let plugin = cluster.dir.path().join("plugin");
    let exec = format!(
        "{{exec: {{apiVersion: client.authentication.k8s.io/v1, interactiveMode: Never, command: {}}}}}",
        plugin.display()
    );
    let token = format!("{{token: {}}}", cluster.api.token());
    let text = cluster.api.kubeconfig().replace(&token, &exec);
    fs::write(cluster.dir.path().join("kubeconfig"), text).expect("kubeconfig");
    for (end, wanted) in [
        (
            "exit 3",
            "exec plugin of the kubeconfig failed: exit status: 3",
        ),
        ("exit 0", "what the exec plugin of the kubeconfig prints"),
    ] {
        put_program(
            &plugin,
            format!("#!/bin/sh\necho '{{token: hunter2, x: [}}'\n{end}\n"),
        );
        let error = Store::open(&cluster.config(1))
            .await
            .expect_err(end)
            .chain();
        assert!(
            error.contains(wanted) && !error.contains("hunter2"),
            "{error}"
        );
    }
}
