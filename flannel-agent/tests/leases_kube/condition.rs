//! The node's condition NetworkUnavailable, and Events about the overlay.

use flannel_agent::{
    health::{Board, Part},
    leases::{KubeOptions, Store},
};
use flannel_testkit::apiserver::{Rule, service_account, upstream_rules};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{
    lease_rig::Log,
    rig::{Cluster, offer, store, until},
};

async fn attend(options: KubeOptions) -> (Board, JoinHandle<()>) {
    let Store::Kube(kube) = Store::open(&store(options)).await.expect("open") else {
        panic!("another store");
    };
    kube.sync(&offer(1).conf, |_| {}).await;
    let board = Board::default();
    let task = tokio::spawn(kube.attend(board.clone(), CancellationToken::new()));
    (board, task)
}

fn settle(board: &Board) {
    for part in Part::ALL {
        board.settle(part);
    }
}

#[tokio::test]
async fn the_condition_says_how_the_node_is() {
    let cluster = Cluster::new(&[1]);
    cluster.allow_events();
    let (board, task) = attend(cluster.options(1)).await;
    assert_eq!(cluster.condition("n1")["reason"], "NoRouteCreated");
    settle(&board);
    until("up", || cluster.condition("n1")["reason"] == "FlannelIsUp").await;
    let condition = cluster.condition("n1");
    assert_eq!(condition["status"], "False");
    assert_eq!(condition["message"], "Flannel is running on this node");
    let asked = cluster.asked("PATCH", "/api/v1/nodes/n1/status");
    assert_eq!(
        asked[0].content_type,
        "application/strategic-merge-patch+json"
    );
    board.lack(Part::Firewall, "busy");
    board.lack(Part::Datapath, "no device flannel.1");
    until("down", || {
        cluster.condition("n1")["reason"] == "FlannelIsDown"
    })
    .await;
    assert_eq!(cluster.condition("n1")["status"], "True");
    assert_eq!(
        cluster.condition("n1")["message"],
        "datapath: no device flannel.1"
    );
    until("an Event", || cluster.event("OverlayDown").is_some()).await;
    settle(&board);
    until("up again", || {
        cluster.condition("n1")["reason"] == "FlannelIsUp"
    })
    .await;
    until("an Event", || cluster.event("OverlayUp").is_some()).await;
    // Another object lacks the condition.
    cluster.api.delete_node("n1").expect("delete");
    cluster
        .api
        .create_node("n1", "10.5.1.0/24")
        .expect("create");
    until("up in the new object", || {
        cluster.condition("n1")["reason"] == "FlannelIsUp"
    })
    .await;
    task.abort();
    drop(task.await);
    assert_eq!(cluster.condition("n1")["reason"], "FlannelIsUp");
}

#[tokio::test]
async fn a_short_trouble_is_none() {
    let cluster = Cluster::new(&[1]);
    let (board, task) = attend(cluster.options(1)).await;
    settle(&board);
    until("up", || cluster.condition("n1")["reason"] == "FlannelIsUp").await;
    cluster.api.forget_asked();
    board.lack(Part::Datapath, "being made");
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    board.settle(Part::Datapath);
    board.lack(Part::Lease, "x");
    board.settle(Part::Lease);
    tokio::time::sleep(std::time::Duration::from_secs(4)).await;
    assert_eq!(cluster.asked("PATCH", "").len(), 0);
    task.abort();
}

#[tokio::test]
async fn the_condition_is_left_alone_on_request() {
    let cluster = Cluster::new(&[1]);
    cluster.allow_events();
    let options = KubeOptions {
        set_network_unavailable: false,
        ..cluster.options(1)
    };
    let (board, task) = attend(options).await;
    settle(&board);
    // The Events come all the same, so that one shows that time has passed.
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    board.lack(Part::Datapath, "x");
    until("an Event", || cluster.event("OverlayDown").is_some()).await;
    assert_eq!(cluster.condition("n1")["reason"], "NoRouteCreated");
    task.abort();
}

#[tokio::test]
async fn what_is_forbidden_is_said_once() {
    let log = Log::capture();
    let cluster = Cluster::new(&[1]);
    let rules = vec![Rule::core("nodes", &["get", "list", "watch"])];
    cluster.api.set_rules(&service_account(), rules);
    let (board, task) = attend(cluster.options(1)).await;
    settle(&board);
    log.until(&["WARN", "CompleteLease execute error err:", "forbidden"])
        .await;
    board.lack(Part::Datapath, "x");
    until("the Event was refused", || {
        cluster
            .asked("POST", "/events")
            .iter()
            .any(|one| one.status == 403)
    })
    .await;
    settle(&board);
    board.lack(Part::Datapath, "y");
    tokio::time::sleep(std::time::Duration::from_secs(4)).await;
    assert_eq!(cluster.asked("POST", "/events").len(), 1);
    assert_eq!(log.lines(&["CompleteLease"]).len(), 1);
    let told = log.lines(&["an Event was not sent"]);
    assert!(told.iter().all(|line| line.contains("DEBUG")), "{told:?}");
    settle(&board);
    cluster.api.set_rules(&service_account(), upstream_rules());
    until("allowed by now", || {
        cluster.condition("n1")["reason"] == "FlannelIsUp"
    })
    .await;
    task.abort();
}
