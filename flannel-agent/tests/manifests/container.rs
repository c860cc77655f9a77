//! A container of a manifest, as the kubelet and a container runtime make it, with `unshare`, `mount` and `setpriv`.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use flannel_testkit::put_program;
use serde_json::Value;

use crate::{
    manifest_rig::{arguments, list, strings, text_of},
    rig::agent_binary,
};

/// What it is made of.
pub(crate) struct Container<'a> {
    /// Name of the node.
    pub(crate) node: &'a str,
    /// Name of the pod.
    pub(crate) pod: &'a str,
    /// Where the API is.
    pub(crate) api: SocketAddr,
    /// The node's /run/flannel. The pod's token is in `account` there.
    pub(crate) run_dir: &'a Path,
    /// The files of the ConfigMap.
    pub(crate) config: &'a [(String, String)],
    /// The container in the manifest.
    pub(crate) spec: &'a Value,
}

impl Container<'_> {
    /// What the agent is called with.
    #[track_caller]
    pub(crate) fn args(&self) -> Vec<&str> {
        arguments(self.spec)
    }

    /// The variables of the manifest, and those of every pod.
    #[track_caller]
    pub(crate) fn env(&self) -> Vec<(String, String)> {
        let given = list(&self.spec["env"]).iter().map(|one| {
            let field = one.pointer("/valueFrom/fieldRef/fieldPath");
            let value = match field.and_then(Value::as_str) {
                Some("spec.nodeName") => self.node,
                Some("metadata.name") => self.pod,
                Some("metadata.namespace") => "kube-flannel",
                Some(other) => panic!("{other}: add it here"),
                None => text_of(one, "/value"),
            };
            (text_of(one, "/name").to_owned(), value.to_owned())
        });
        let place = [
            ("KUBERNETES_SERVICE_HOST", self.api.ip().to_string()),
            ("KUBERNETES_SERVICE_PORT", self.api.port().to_string()),
        ];
        let place = place.map(|(name, value)| (name.to_owned(), value));
        given.chain(place).collect()
    }

    /// A program that runs the agent in it; its arguments are the agent's.
    #[track_caller]
    pub(crate) fn program(&self) -> PathBuf {
        let config = self.run_dir.join("config");
        fs::create_dir_all(&config).expect("a directory");
        for (name, text) in self.config {
            fs::write(config.join(name), text).expect("write a file of the ConfigMap");
        }
        let inside = self.put("inside", &format!("set -e\n{}", self.inside()));
        self.put(
            "container",
            &format!("exec unshare --mount {} \"$@\"\n", inside.display()),
        )
    }

    fn put(&self, name: &str, text: &str) -> PathBuf {
        let path = self.run_dir.join(name);
        put_program(&path, format!("#!/bin/sh\n{text}"));
        path
    }

    /// Mounts, and then the agent. `setpriv` bounds the capabilities, which are what uid 0 has after the next exec.
    fn inside(&self) -> String {
        let context = &self.spec["securityContext"];
        let privileged = context["privileged"] == true;
        let (sys, proc_sys, bound) = if privileged {
            ("rw", "", String::new())
        } else {
            let names = strings(&context["capabilities"]["add"]);
            let names: Vec<String> = names
                .iter()
                .map(|name| format!("+{}", name.to_lowercase()))
                .collect();
            let names = names.join(",");
            (
                "ro",
                "mount --bind /proc/sys /proc/sys\nmount -o remount,ro,bind /proc/sys\n",
                format!("setpriv --bounding-set=-all,{names} --inh-caps=-all,{names} "),
            )
        };
        let mut mounts = list(&self.spec["volumeMounts"]).iter();
        let bpffs = if mounts.any(|mount| mount["mountPath"] == "/sys/fs/bpf") {
            "mount --move /mnt/bpf /sys/fs/bpf\n"
        } else {
            ""
        };
        format!(
            "mount -t tmpfs tmpfs /mnt\n\
             mkdir /mnt/run /mnt/bpf /mnt/upper /mnt/work\n\
             mount --bind {run} /mnt/run\n\
             mount --bind /sys/fs/bpf /mnt/bpf\n\
             mount -t overlay overlay -o lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work /etc\n\
             mkdir -p /etc/kube-flannel\n\
             mount --bind /mnt/run/config /etc/kube-flannel\n\
             mount -t tmpfs tmpfs /run\n\
             mkdir -p /run/flannel /run/secrets/kubernetes.io/serviceaccount\n\
             mount --bind /mnt/run/account /run/secrets/kubernetes.io/serviceaccount\n\
             mount --move /mnt/run /run/flannel\n\
             mount -t sysfs -o {sys} sysfs /sys\n\
             {bpffs}{proc_sys}\
             [ ! -d /lib/modules ] || mount -t tmpfs -o ro tmpfs /lib/modules\n\
             exec {bound}{agent} \"$@\"\n",
            run = self.run_dir.display(),
            agent = agent_binary().display(),
        )
    }
}
