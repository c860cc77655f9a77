use tempfile::TempDir;

use super::*;

#[test]
fn dependencies_are_followed_but_for_those_of_scripts() {
    let names = archive::closure(&WANTED, &NOT_FOLLOWED, |packages| {
        let on = packages.iter().flat_map(|package| match package.as_str() {
            "iptables" => &["libxtables12", "netbase", "libc6"][..],
            "libxtables12" => &["libc6"],
            "ca-certificates" => &["openssl", "debconf"],
            "openssl" => &["libssl3"],
            _ => &[],
        });
        Ok(on.map(|name| (*name).to_owned()).collect())
    })
    .expect("names");
    for name in WANTED.iter().chain(&["libxtables12", "libc6"]) {
        assert!(names.iter().any(|found| found == name), "{name}: {names:?}");
    }
    for name in ["openssl", "libssl3", "debconf"] {
        assert!(
            !names.iter().any(|found| found == name),
            "{name}: {names:?}"
        );
    }
}

/// As much of the packages as is looked for.
fn unpacked() -> TempDir {
    let dir = TempDir::new().expect("a directory");
    for (name, text) in [
        ("bin/busybox", ""),
        ("bin/ip", ""),
        ("bin/ss", ""),
        ("usr/bin/mawk", ""),
        ("usr/sbin/iptables-nft", ""),
        ("usr/sbin/iptables-nft-save", ""),
        ("usr/lib/x/gconv/a.so", ""),
        ("usr/lib/x/xtables/libxt_mark.so", ""),
        ("usr/share/doc/p/copyright", "c"),
        ("usr/share/doc/p/changelog.gz", ""),
        (
            "usr/share/ca-certificates/mozilla/B.crt",
            "-----BEGIN CERTIFICATE-----\nB\n",
        ),
        (
            "usr/share/ca-certificates/mozilla/A.crt",
            "-----BEGIN CERTIFICATE-----\nA",
        ),
        ("tmp/x", ""),
        ("var/cache/x", ""),
    ] {
        write(&dir.path().join(name), text, 0o644).expect("write");
    }
    dir
}

#[test]
fn the_base_has_what_packages_scripts_would_have_made() {
    let dir = unpacked();
    arrange(dir.path()).expect("arrange");
    let link = |name: &str| {
        let to = fs::read_link(dir.path().join(name)).expect(name);
        to.display().to_string()
    };
    assert_eq!(link("usr/sbin/iptables"), "iptables-nft");
    assert_eq!(link("usr/sbin/iptables-save"), "iptables-nft-save");
    assert_eq!(link("usr/sbin/ip6tables-restore"), "ip6tables-nft-restore");
    assert_eq!(link("bin/sh"), "dash");
    assert_eq!(link("usr/bin/awk"), "mawk");
    // mk-docker-opts.sh asks for dirname.
    for applet in ["cp", "dirname", "mktemp"] {
        assert_eq!(link(&format!("bin/{applet}")), "busybox");
    }
    let read = |name: &str| fs::read_to_string(dir.path().join(name)).expect(name);
    assert_eq!(
        read("etc/ssl/certs/ca-certificates.crt"),
        "-----BEGIN CERTIFICATE-----\nA\n-----BEGIN CERTIFICATE-----\nB\n"
    );
    assert_eq!(read("usr/share/doc/p/copyright"), "c");
    for kept in ["bin/ip", "usr/lib/x/xtables/libxt_mark.so", "run", "proc"] {
        assert!(dir.path().join(kept).exists(), "{kept}");
    }
    for gone in [
        "bin/ss",
        "tmp",
        "usr/lib/x/gconv",
        "usr/share/doc/p/changelog.gz",
        "var",
    ] {
        assert!(!dir.path().join(gone).exists(), "{gone}");
    }
    check(dir.path()).expect("nothing is wrong with it");
}

#[test]
fn a_lacking_library_and_a_writable_file_are_found() {
    let dir = unpacked();
    let file = dir.path().join("bin/ip");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).expect("permissions");
    let why = check(dir.path()).expect_err("it is writable").to_string();
    assert!(why.contains("bin/ip") && why.contains("writable"), "{why}");
    let shell = fs::canonicalize("/bin/sh").expect("a shell");
    fs::copy(shell, &file).expect("copy");
    let why = check(dir.path()).expect_err("no C library").to_string();
    assert!(why.contains("libc.so.6"), "{why}");
    write(&dir.path().join("lib/x/libc.so.6"), "", 0o644).expect("write");
    check(dir.path()).expect("there is one");
}

#[test]
fn the_release_is_named_as_scanners_name_it() {
    let text = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_ID=\"12\"\nID=debian\n";
    assert_eq!(distro(text).expect("both"), "debian-12");
    assert!(distro("ID=debian\n").is_err());
    assert_eq!(
        field("Package: kmod\nVersion: 30+1: x\n", "Version").expect("there"),
        "30+1: x"
    );
}
