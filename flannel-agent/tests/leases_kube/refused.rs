//! What the agent is not allowed to do.

use flannel_agent::leases::{ErrorKind, Store};
use flannel_testkit::apiserver::{Rule, service_account, upstream_rules};

use crate::{
    lease_rig::Log,
    rig::{Cluster, offer, until},
};

#[tokio::test]
async fn what_may_not_be_written_is_tried_again() {
    let log = Log::capture();
    let cluster = Cluster::new(&[1]);
    let mut agent = cluster.agent(1).await;
    agent.until("connected", |view| view.connected).await;
    cluster.api.set_rules(
        &service_account(),
        vec![Rule::core("nodes", &["list", "watch"])],
    );
    cluster.set("n1", "public-ip", None);
    let view = agent
        .until("a complaint", |view| view.last_error.is_some())
        .await;
    let error = view.last_error.expect("an error");
    assert!(
        error.contains("our annotations cannot be written") && error.contains("forbidden"),
        "{error}"
    );
    assert!(agent.is_running() && log.lines(&["ERROR", "cannot be written"]).len() == 1);
    cluster.api.set_rules(&service_account(), upstream_rules());
    until("written", || cluster.get("n1", "public-ip").is_some()).await;
    agent
        .until("well again", |view| view.last_error.is_none())
        .await;
    agent.stop().await;
}

#[tokio::test]
async fn a_forbidden_list_is_the_servers_word() {
    let cluster = Cluster::new(&[1]);
    cluster.api.set_rules(&service_account(), Vec::new());
    let store = Store::open(&cluster.config(1)).await.expect("open");
    let error = store.list().await.expect_err("forbidden");
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(
        error.chain().contains("cannot list resource \"nodes\""),
        "{}",
        error.chain()
    );
    cluster.api.set_rules(&service_account(), upstream_rules());
    assert!(store.list().await.is_ok());
    assert!(store.acquire(&offer(1)).await.is_ok());
}
