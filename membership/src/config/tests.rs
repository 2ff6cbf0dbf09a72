use super::*;
use crate::timing::Profile;

/// The four-node cluster of the historical tests, with what is ours beside it.
const SEED: &str = r#"<?xml version="1.0"?>
<cluster name="mycluster" config_version="40">
  <cman expected_votes="6" keyfile="/etc/cluster/key"/>
  <cairn profile="default" dialect="rhel5" one_host="no"/>
  <quorumd device="file:/srv/lun#part=1" label="qd" votes="2" interval_ms="400" tko="8">
    <heuristic program="ping -c1 gw" score="1"/>
  </quorumd>
  <fence_daemon post_fail_delay="0" post_join_delay="3"/>
  <clusternodes>
    <clusternode name="web2" nodeid="1" addr="192.168.12.240"><fence><method name="1"><device name="apc" port="1"/></method></fence></clusternode>
    <clusternode name="Mysql1" nodeid="2"><fence><method name="1"><device name="apc" port="2"/></method></fence></clusternode>
    <clusternode name="Mysql2" nodeid="3"><fence><method name="1"><device name="apc" port="3"/></method></fence></clusternode>
    <clusternode name="web1" nodeid="4"><fence><method name="1"><device name="apc" port="4"/></method></fence></clusternode>
  </clusternodes>
  <fencedevices><fencedevice name="apc" agent="fence_apc" ipaddr="10.0.0.9" passwd="secret"/></fencedevices>
  <rm><service name="webserver" autostart="1"><ip address="192.168.12.233"/></service></rm>
</cluster>"#;

fn rules(text: &str) -> Vec<String> {
    match Config::parse(text, "cluster.conf") {
        Ok(c) => panic!("accepted, with warnings {:?}", c.warnings),
        Err(ConfigError::Invalid(problems)) => problems.into_iter().map(|p| p.rule).collect(),
        Err(e) => panic!("{e}"),
    }
}

fn warnings(text: &str) -> Vec<String> {
    Config::parse(text, "cluster.conf").unwrap().warnings.into_iter().map(|p| p.text).collect()
}

#[test]
fn the_historical_cluster_is_read() {
    let c = Config::parse(SEED, "cluster.conf").unwrap();
    assert_eq!((c.name.as_str(), c.version, c.cluster_id), ("mycluster", 40, 56756));
    assert_eq!(c.multicast, "239.192.221.146");
    assert_eq!(c.nodes.iter().map(|n| n.id).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert_eq!((c.node_votes(), c.device_votes(), c.expected_votes), (4, 2, Some(6)));
    assert_eq!(c.node_named("web2").unwrap().addr, "192.168.12.240");
    assert_eq!(c.node_named("web1").unwrap().addr, "web1", "without addr the name is resolved");
    assert_eq!(c.fence_devices["apc"].agent, "fence_apc");
    assert_eq!(c.nodes[1].methods[0].devices[0].attrs, [("port".to_owned(), "2".to_owned())]);
    assert_eq!(c.timing.base.profile, Profile::Default);
    let service = c.rm.as_ref().unwrap().child("service").unwrap();
    assert_eq!(service.child("ip").unwrap().attr("address"), Some("192.168.12.233"));
    assert_eq!(c.quorumd.unwrap().heuristics.len(), 1);
}

#[test]
fn complaints_carry_line_column_and_rule() {
    let text = SEED.replace("nodeid=\"3\"", "nodeid=\"2\"");
    let Err(ConfigError::Invalid(problems)) = Config::parse(&text, "/etc/cluster/cluster.conf") else {
        panic!("accepted")
    };
    assert_eq!(problems.len(), 1);
    let p = &problems[0];
    assert_eq!((p.line, p.column, p.rule.as_str()), (12, 5, "CF-1"));
    assert!(p.to_string().starts_with("/etc/cluster/cluster.conf:12:5: CF-1: node id 2 of Mysql2"), "{p}");
}

#[test]
fn each_rule_refuses_what_breaks_it() {
    let with = |from: &str, to: &str| {
        assert!(SEED.contains(from), "{from}");
        SEED.replace(from, to)
    };
    let cases = [
        ("CF-0", with("</cluster>", "")),
        ("CF-0", with("config_version=\"40\"", "config_version=\"x\"")),
        ("CF-1", with("nodeid=\"4\"", "nodeid=\"0\"")),
        ("CF-1", with("nodeid=\"4\"", "nodeid=\"17\"")),
        ("CF-1", with("name=\"mycluster\"", "name=\"a_name_that_is_too_long\"")),
        ("CF-1", with("name=\"web1\" nodeid=\"4\"", "name=\"../x\" nodeid=\"4\"")),
        ("CF-2", with("<cman ", "<cman two_node=\"1\" ")),
        ("CF-3", with("expected_votes=\"6\"", "expected_votes=\"4\"")),
        ("CF-4", with("label=\"qd\"", "label=\"qd\" master_wins=\"1\"")),
        ("CF-5", with("<fence><method name=\"1\"><device name=\"apc\" port=\"4\"/></method></fence>", "")),
        ("CF-14", with("name=\"Mysql1\" nodeid", "name=\"Mysql1\" addr=\"192.168.12.240\" nodeid")),
        ("CF-15", with("device=\"file:/srv/lun#part=1\" ", "")),
        ("CF-16", with("<fencedevice name=\"apc\"", "<fencedevice name=\"apd\"")),
        ("CF-18", with("one_host=\"no\"", "one_host=\"yes\" run_dir=\"/run/cairn\"")),
        ("FE-3", with("agent=\"fence_apc\"", "agent=\"fence_local\"")),
        ("QD-3", with("tko=\"8\"", "tko=\"3\"")),
        ("QD-6", with("interval_ms=\"400\"", "interval_ms=\"900\"")),
        ("TT-2", with("<quorumd", "<totem token=\"200\"/><quorumd")),
    ];
    for (rule, text) in cases {
        let found = rules(&text);
        assert!(found.iter().any(|r| r == rule), "{rule} not among {found:?}");
    }
}

#[test]
fn unsafe_timing_overrides_availability_rules_only() {
    // QD-1: the master's successor may come late; costs availability
    let slow = SEED.replace("interval_ms=\"400\"", "interval_ms=\"490\"");
    assert_eq!(rules(&slow), ["QD-1"]);
    let allowed = slow.replace("one_host=\"no\"", "one_host=\"no\" unsafe_timing=\"QD-1\"");
    assert!(Config::parse(&allowed, "c").is_ok());
    let forbidden = SEED.replace("one_host=\"no\"", "one_host=\"no\" unsafe_timing=\"QD-6\"");
    assert!(rules(&forbidden).iter().any(|r| r == "CF-0"));
}

#[test]
fn what_is_not_known_is_kept_and_warned_about() {
    let text = SEED
        .replace("<rm>", "<newthing a=\"1\"><b/></newthing><rm>")
        .replace("label=\"qd\"", "label=\"qd\" colour=\"red\"");
    let c = Config::parse(&text, "c").unwrap();
    assert_eq!(c.other[0].child("b").unwrap().name, "b");
    let all = c.warnings.iter().map(|w| w.text.clone()).collect::<Vec<_>>().join("\n");
    assert!(all.contains("<newthing>") && all.contains("\"colour\""), "{all}");
}

#[test]
fn too_few_device_votes_to_shrink_are_said() {
    let text = SEED.replace("votes=\"2\"", "votes=\"1\"");
    let all = warnings(&text).join("\n");
    assert!(all.contains("quorum will not shrink: device votes 1, at least 2 needed"), "{all}");
}

#[test]
fn on_one_host_the_built_in_agent_is_implied() {
    let text = r#"<cluster name="one"><cairn one_host="yes" run_dir="/tmp/x/%n"/><clusternodes>
        <clusternode name="a" nodeid="1" addr="127.0.0.1" port="7001"/><clusternode name="b" nodeid="2" addr="127.0.0.1" port="7002"/>
        <clusternode name="c" nodeid="3" addr="127.0.0.1" port="7003"/></clusternodes></cluster>"#;
    let c = Config::parse(text, "c").unwrap();
    assert_eq!(c.nodes[2].methods[0].devices[0].name, "fence_local");
    assert_eq!(c.nodes[2].run_dir, Path::new("/tmp/x/c"));
    assert!(c.warnings.is_empty(), "{:?}", c.warnings);
}

#[test]
fn a_key_that_others_may_read_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    fs::write(&path, [7u8; 64]).unwrap();
    let mut c = Config::parse(SEED, "c").unwrap();
    c.key_file = Some(path.clone());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(c.read_key().unwrap_err().to_string().starts_with("CF-11"), "group may read");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(c.read_key().unwrap().len(), 64);
    fs::write(&path, [7u8; 5]).unwrap();
    assert!(c.read_key().is_err(), "five bytes are no key");
}

#[test]
fn damaged_text_is_an_error_and_never_a_panic() {
    for cut in 0..SEED.len() {
        assert!(Config::parse(&SEED[..cut], "c").is_err() || cut == SEED.len());
    }
    let deep = format!("<cluster name=\"x\"><rm>{}{}</rm></cluster>", "<a>".repeat(200), "</a>".repeat(200));
    assert!(Config::parse(&deep, "c").is_err());
}
