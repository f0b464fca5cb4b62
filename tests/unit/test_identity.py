"""Identities of a consortium, judged by openssl, by TLS handshakes and by Flower's own readers of keys."""

import json
import os
import shutil
import ssl
import stat
import subprocess
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import typer
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from typer.testing import CliRunner

from fedssl import cli_consortium
from fedssl.deployment.identity.admission import Registered, admitted
from fedssl.deployment.identity.authority import Authority
from fedssl.deployment.identity.certificates import fingerprint, pem, private_ssh, public_key_bytes, read_request
from fedssl.deployment.identity.enrolment import Identity, install, request
from fedssl.deployment.identity.expiry import overview
from fedssl.deployment.identity.issued import Record
from fedssl.deployment.identity.issuing import certificate_for, subject_of
from fedssl.deployment.identity.provision import provision
from fedssl.deployment.settings import Consortium, ServerKit, SiteKit
from fedssl.errors import ConfigError, StorageError
from fedssl.site.rules import Rules

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
CONSORTIUM = Consortium(
    "breast-2025", "fed.example.org", 9443, ("NORTH", "SOUTH"), ("method=swav", "data.label='a: b'"), ("10.0.0.5",),
    contact="Dr. <X>",
)  # fmt: skip
COMMAND = typer.Typer()
for verb in ("provision", "request", "sign", "install", "revoke", "certificates"):
    COMMAND.command()(getattr(cli_consortium, verb))
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


@pytest.fixture
def kits(tmp_path):
    provision(CONSORTIUM, tmp_path / "kits")
    return tmp_path / "kits"


@pytest.fixture
def authority(kits):
    return Authority.open(kits / "authority")


def enrol(kits, kit, now=NOW, **more):
    """Request, sign, hand over, install."""
    authority = Authority.open(kits / "authority")
    issued = authority.sign(read_request(request(kits / kit, **more).path), now)
    authority.hand_to_server(issued)
    path = kits / "came.crt"
    path.write_bytes(issued.pem)
    install(kits / kit, path, now)
    return issued


def ask(kits, now=NOW):
    server = kits / "server"
    there, refused = admitted(server / "sites", server / "ca.crt", server / "revoked.crl", now)
    return [one.name for one in there], refused


def made_request(name, key=None):
    key = key or ec.generate_private_key(ec.SECP384R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject_of(name, "breast-2025"))
    return builder.sign(key, hashes.SHA384())


def openssl(*words):
    done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# ---- provisioning


def private_files(folder):
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and b"PRIVATE" in path.read_bytes()
    )


def test_provisioned_kits_hold_no_private_key_but_the_authoritys(kits):
    assert private_files(kits) == ["authority/ca.key"]
    assert mode(kits / "authority") == 0o700
    assert mode(kits / "authority" / "ca.key") == 0o600


def test_all_in_one_makes_all_keys_for_their_owner_alone_and_says_so_in_every_readme(tmp_path):
    provision(CONSORTIUM, tmp_path / "kits", all_in_one=True)
    kits = tmp_path / "kits"
    keys = ["authority/ca.key", "server/server.key", "sites/NORTH/site.key", "sites/SOUTH/site.key"]
    assert private_files(kits) == keys
    assert {mode(kits / key) for key in keys} == {0o600}
    assert ask(kits, datetime.now(UTC)) == (["NORTH", "SOUTH"], {})
    for kit in ("server", "sites/NORTH"):
        assert "FOR TRIALS ONLY" in (kits / kit / "README.md").read_text()


def test_the_kits_settings_are_read_as_the_consortium_says(kits):
    site = SiteKit.read(kits / "sites" / "NORTH")
    assert (site.site, site.server, site.data) == ("NORTH", "fed.example.org:9443", "/path/to/images")
    server = ServerKit.read(kits / "server")
    assert (server.name, server.port, server.inner_port) == ("breast-2025", 9443, 9444)
    assert site.plan == server.plan == CONSORTIUM.plan
    assert Consortium.read(kits / "authority" / "consortium.yaml") == CONSORTIUM


def test_an_empty_plan_and_an_address_of_version_6_are_read_too(tmp_path):
    provision(replace(CONSORTIUM, plan=(), host="2001:db8::1", port=65535), tmp_path / "kits")
    site = SiteKit.read(tmp_path / "kits" / "sites" / "NORTH")
    assert (site.plan, site.server) == ((), "[2001:db8::1]:65535")
    assert ServerKit.read(tmp_path / "kits" / "server").inner_port == 65534


def test_a_plan_that_cannot_be_composed_here_leaves_the_policy_unbound_and_readable(tmp_path):
    provision(replace(CONSORTIUM, plan=("encoder=of-another-version",)), tmp_path / "kits")
    for site in CONSORTIUM.sites:
        text = (tmp_path / "kits" / "sites" / site / "policy.yaml").read_text()
        assert "# configurations:" in text
        assert Rules.read(tmp_path / "kits" / "sites" / site / "policy.yaml").entries["min_sites"].value >= 1


def test_a_kit_has_all_its_files_readable_and_its_scripts_run(kits):
    site, server = kits / "sites" / "NORTH", kits / "server"
    names = {
        "ca.crt",
        "site.yaml",
        "start.sh",
        "fedssl-agent.service",
        "fedssl-relay.service",
        "compose.yaml",
        "README.md",
    }
    assert names <= {path.name for path in site.iterdir()}
    assert {"ca.crt", "server.yaml", "revoked.crl", "sites", "start.sh", "fedssl-server.service", "compose.yaml"} <= {
        path.name for path in server.iterdir()
    }
    for kit in (site, server):
        assert mode(kit / "start.sh") == 0o755
        assert mode(kit / "README.md") == mode(kit / "ca.crt") == 0o644
        without = subprocess.run(
            ["/bin/sh", kit / "start.sh"], env={"PATH": "/nowhere"}, capture_output=True, check=False
        )
        assert without.returncode == 127
        assert b"fedssl is not on the PATH" in without.stderr


def test_start_calls_fedssl_with_the_kit(kits, tmp_path):
    fake = tmp_path / "bin" / "fedssl"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{fake.parent}:/usr/bin:/bin"}
    for kit, verb in ((kits / "sites" / "NORTH", "site"), (kits / "server", "server")):
        done = subprocess.run(
            [kit / "start.sh", "--one-user"], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout == f"{verb} {kit} --one-user\n"


def test_in_containers_and_under_systemd_the_relay_gets_neither_images_nor_key(kits):
    site = kits / "sites" / "NORTH"
    services = yaml.safe_load((site / "compose.yaml").read_text())["services"]
    assert services["relay"]["user"] != services["agent"]["user"]
    assert services["relay"]["network_mode"] == "service:agent"
    mounted = {volume.split(":")[0] for volume in services["relay"]["volumes"]}
    assert mounted == {"./site.yaml", "./ca.crt", "./relay"}
    assert "/path/to/images:/path/to/images:ro" in services["agent"]["volumes"]
    unit = (site / "fedssl-relay.service").read_text().splitlines()
    assert {
        "User=fedssl-relay",
        "IPAddressDeny=any",
        "IPAddressAllow=localhost",
        "InaccessiblePaths=/path/to/images",
    } <= {*unit}
    assert "InaccessiblePaths=/srv/fedssl/NORTH/site.key" in unit
    agent = (site / "fedssl-agent.service").read_text().splitlines()
    assert {"User=fedssl-agent", "Restart=always", "RestartSec=5", "ProtectSystem=strict"} <= {*agent}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_no_fault_in_the_units(kits):
    units = [*kits.rglob("*.service")]
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert len(units) == 5
    assert done.returncode == 0
    assert "fedssl-" not in done.stderr


def test_kits_are_never_written_over(kits):
    before = (kits / "authority" / "ca.key").read_bytes()
    with pytest.raises(ConfigError, match="kits is not empty"):
        provision(CONSORTIUM, kits)
    assert (kits / "authority" / "ca.key").read_bytes() == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "kits").mkdir()
    provision(CONSORTIUM, tmp_path / "kits")
    assert (tmp_path / "kits" / "authority" / "ca.key").exists()


def test_all_that_is_wrong_with_a_consortium_is_said_at_once(tmp_path):
    wrong = Consortium(
        "a b", "http://x", 0, ("north", "NORTH", "../x", ".y", "Server", "x" * 65, ""), ("a\nb",), ("300.1.1.1",), 4000
    )
    with pytest.raises(ConfigError) as caught:
        provision(wrong, tmp_path / "kits")
    found = str(caught.value)
    for words in ("name is 'a b'", "host holds 'http://x'", "also holds '300.1.1.1'", "port is 0", "valid_days is 4000",
                  "'../x'", "'.y'", "'north' is named 2 times", "cannot be called 'Server'", "x" * 65, "site ''",
                  "one line"):  # fmt: skip
        assert words in found
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="sites is empty"):
        provision(replace(CONSORTIUM, sites=()), tmp_path / "kits")


@pytest.mark.parametrize("host", ["localhost", "a.b-c.org", "10.0.0.1", "::1", "x" * 63])
def test_names_and_addresses_of_hosts_are_taken(host, tmp_path):
    provision(replace(CONSORTIUM, host=host), tmp_path / "kits")


@pytest.mark.parametrize("host", ["", "a..b", "-a.org", "a_b.org", "10.0.0", "fe80::1%eth0", "a:1", "x" * 64, "ü.org"])
def test_what_is_no_host_is_not(host, tmp_path):
    with pytest.raises(ConfigError, match="neither a DNS name nor an IP address"):
        provision(replace(CONSORTIUM, host=host), tmp_path / "kits")


# ---- what others say of our files


@needs_openssl
def test_openssl_verifies_authority_server_and_site(kits):
    enrol(kits, "server")
    enrol(kits, "sites/NORTH")
    ca, crl = kits / "server" / "ca.crt", kits / "server" / "revoked.crl"
    site, server = kits / "sites" / "NORTH" / "site.crt", kits / "server" / "server.crt"
    strict = ("-x509_strict", "-crl_check", "-CRLfile", crl, "-CAfile", ca)
    assert openssl("verify", *strict, "-purpose", "sslclient", site)[0] == 0
    for name in ("-verify_hostname fed.example.org", "-verify_ip 10.0.0.5", "-verify_ip 127.0.0.1"):
        assert openssl("verify", *strict, "-purpose", "sslserver", *name.split(), server)[0] == 0
    assert openssl("verify", *strict, "-verify_hostname", "evil.org", server)[0] != 0
    assert openssl("verify", *strict, "-purpose", "sslserver", site)[0] != 0
    assert openssl("verify", *strict, "-purpose", "sslclient", server)[0] != 0
    assert openssl("verify", "-x509_strict", "-CAfile", ca, ca)[0] == 0
    text = openssl("x509", "-in", ca, "-noout", "-text")[1]
    assert "CA:TRUE, pathlen:0" in text
    assert "Certificate Sign, CRL Sign" in text
    assert "ecdsa-with-SHA384" in text
    Authority.open(kits / "authority").revoke("NORTH", NOW)
    fresh = kits / "authority" / "revoked.crl"
    assert "verify OK" in openssl("crl", "-in", fresh, "-CAfile", ca, "-noout")[1]
    code, said = openssl("verify", "-crl_check", "-CRLfile", fresh, "-CAfile", ca, site)
    assert code != 0
    assert "certificate revoked" in said


@needs_openssl
def test_openssl_verifies_the_request_and_hashes_the_key_to_our_fingerprint(kits, tmp_path):
    made = request(kits / "sites" / "NORTH")
    code, said = openssl("req", "-in", made.path, "-verify", "-noout", "-subject")
    assert code == 0
    assert "CN = NORTH" in said
    openssl("req", "-in", made.path, "-noout", "-pubkey", "-out", tmp_path / "pub")
    openssl("pkey", "-pubin", "-in", tmp_path / "pub", "-outform", "DER", "-out", tmp_path / "der")
    digest = openssl("dgst", "-sha256", "-r", tmp_path / "der")[1].split()[0]
    assert made.fingerprint.replace(" ", "") == digest


@needs_openssl
def test_openssl_reads_the_servers_key(kits):
    enrol(kits, "server")
    assert openssl("pkey", "-in", kits / "server" / "server.key", "-check", "-noout")[0] == 0


def shake(kits, ca, host):
    """One TLS handshake with the server's certificate, over memory; gives the client's error, or an empty text."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(kits / "server" / "server.crt", kits / "server" / "server.key")
    client = ssl.create_default_context(cafile=ca)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    here = client.wrap_bio(down, up, server_hostname=host)
    there = server.wrap_bio(up, down, server_side=True)
    open_ends = {here, there}
    for _ in range(10):
        for end in [here, there]:
            try:
                end.do_handshake()
                open_ends.discard(end)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError as error:
                return error.verify_message
    assert not open_ends
    return ""


def test_a_tls_client_accepts_the_server_by_its_names_and_refuses_other_names_and_authorities(kits, tmp_path):
    enrol(kits, "server", datetime.now(UTC))
    ca = kits / "sites" / "NORTH" / "ca.crt"
    for host in ("fed.example.org", "localhost", "127.0.0.1", "10.0.0.5"):
        assert shake(kits, ca, host) == ""
    assert "mismatch" in shake(kits, ca, "evil.example.org")
    assert "mismatch" in shake(kits, ca, "10.0.0.6")
    provision(CONSORTIUM, tmp_path / "others")
    assert shake(kits, tmp_path / "others" / "authority" / "ca.crt", "fed.example.org")


def test_flower_reads_the_sites_key_and_sends_the_bytes_that_the_gate_expects(kits, tmp_path):
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives import asymmetric

    enrol(kits, "sites/NORTH")
    key = load_ssh_private_key((kits / "sites" / "NORTH" / "site.key").read_bytes(), None)  # as flower-supernode does
    assert asymmetric.uses_nist_ec_curve(key.public_key())
    server = kits / "server"
    (one,), _ = admitted(server / "sites", server / "ca.crt", server / "revoked.crl", NOW)
    assert one.public_key_bytes == asymmetric.public_key_to_bytes(key.public_key())
    (tmp_path / "NORTH.pub").write_text(one.public_key_ssh)
    assert try_load_public_key(tmp_path / "NORTH.pub") == one.public_key_bytes
    assert one.public_key_ssh.startswith("ecdsa-sha2-nistp384 ")
    assert one.not_after == NOW + 365 * DAY


# ---- keys and requests in a kit


def test_a_key_is_made_once_and_never_written_over(kits):
    kit = kits / "sites" / "NORTH"
    old = os.umask(0)
    try:
        request(kit)
    finally:
        os.umask(old)
    assert mode(kit / "site.key") == 0o600
    assert mode(kit / "site.csr") == 0o644
    before = (kit / "site.key").read_bytes()
    with pytest.raises(ConfigError, match="--renew"):
        request(kit)
    request(kit, renew=True)
    assert (kit / "site.key").read_bytes() == before


def test_a_link_where_the_key_should_be_is_not_followed(kits, tmp_path):
    (kits / "sites" / "NORTH" / "site.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"site\.key is there already"):
        request(kits / "sites" / "NORTH")
    assert not (tmp_path / "elsewhere").exists()


def test_a_request_names_its_site_and_nothing_secret_is_in_it(kits):
    made = request(kits / "sites" / "NORTH")
    assert read_request(made.path).is_signature_valid
    assert made.name == "NORTH"
    assert b"PRIVATE" not in made.path.read_bytes()
    assert request(kits / "server").name == "server"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_text("x"), "damaged"),
        (lambda path: path.chmod(0o644), "chmod 600"),
        (lambda path: path.write_bytes(private_ssh(ec.generate_private_key(ec.SECP256R1()))), "secp256r1"),
    ],
)
def test_a_spoilt_key_is_named_on_renewal(kits, spoil, said):
    request(kits / "sites" / "NORTH")
    spoil(kits / "sites" / "NORTH" / "site.key")
    with pytest.raises(ConfigError, match=said):
        request(kits / "sites" / "NORTH", renew=True)


def test_a_folder_that_is_no_kit_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no kit"):
        request(tmp_path)


def test_a_kit_that_cannot_be_written_says_so(kits, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedssl.deployment.identity.certificates.os.open", full)
    with pytest.raises(StorageError, match="No space left"):
        request(kits / "sites" / "NORTH")


# ---- what is installed


def refusal(kits, data, now=NOW, kit="sites/NORTH"):
    path = kits / "came.crt"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        install(kits / kit, path, now)
    assert not Identity.of(kits / kit).certificate_file.exists()
    return str(caught.value)


def test_only_the_kits_own_certificate_is_installed(kits, authority, tmp_path):
    north, south, server = kits / "sites" / "NORTH", kits / "sites" / "SOUTH", kits / "server"
    mine = authority.sign(read_request(request(north).path), NOW)
    others = authority.sign(read_request(request(south).path), NOW)
    servers = authority.sign(read_request(request(server).path), NOW)
    provision(CONSORTIUM, tmp_path / "foreign")
    stranger = Authority.open(tmp_path / "foreign" / "authority").sign(read_request(north / "site.csr"), NOW)
    assert "belongs to SOUTH, not to NORTH" in refusal(kits, others.pem)
    assert "is for a server, not for a site" in refusal(kits, servers.pem)
    assert "not signed by the authority" in refusal(kits, stranger.pem)
    assert "request that nobody has signed" in refusal(kits, (north / "site.csr").read_bytes())
    assert "authority's own" in refusal(kits, (north / "ca.crt").read_bytes())
    assert "damaged" in refusal(kits, mine.pem[:200])
    assert "expired" in refusal(kits, mine.pem, NOW + 366 * DAY)
    assert "clock" in refusal(kits, mine.pem, NOW - DAY)
    (north / "site.key").unlink()
    request(north)
    assert "another key" in refusal(kits, mine.pem)


# ---- what the authority signs


def test_a_request_for_an_unknown_name_or_of_another_kind_of_key_is_refused(authority):
    with pytest.raises(ConfigError, match=r"EAST, which is no site.*NORTH, SOUTH"):
        authority.sign(made_request("EAST"), NOW)
    with pytest.raises(ConfigError, match="north, which is no site"):
        authority.sign(made_request("north"), NOW)
    with pytest.raises(ConfigError, match="secp256r1"):
        authority.sign(made_request("NORTH", ec.generate_private_key(ec.SECP256R1())), NOW)
    with pytest.raises(ConfigError, match="RSA"):
        authority.sign(made_request("NORTH", rsa.generate_private_key(65537, 2048)), NOW)
    assert authority.record.read() == []


def test_a_request_that_does_not_prove_possession_of_its_key_is_refused(authority):
    der = bytearray(made_request("NORTH").public_bytes(serialization.Encoding.DER))
    at = der.index(b"NORTH")
    der[at : at + 5] = b"SOUTH"
    with pytest.raises(ConfigError, match="not signed by its own key"):
        authority.sign(x509.load_der_x509_csr(bytes(der)), NOW)


def test_what_a_request_asks_for_beyond_its_name_and_key_is_not_granted(authority):
    key = ec.generate_private_key(ec.SECP384R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject_of("NORTH", "other"))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("fed.example.org")]), critical=False)
    found = x509.load_pem_x509_certificate(authority.sign(builder.sign(key, hashes.SHA384()), NOW).pem)
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    with pytest.raises(x509.ExtensionNotFound):
        found.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert found.subject == subject_of("NORTH", "breast-2025")


def test_nobody_takes_over_a_name_and_a_replaced_key_is_revoked(kits, authority):
    enrol(kits, "sites/NORTH")
    other = made_request("NORTH")
    with pytest.raises(ConfigError, match="take over its name"):
        authority.sign(other, NOW)
    assert ask(kits) == (["NORTH"], {})
    issued = authority.sign(other, NOW, replace=True)
    assert issued.kind == "new key"
    authority.hand_to_server()  # the new certificate has not come yet: the old one is out
    assert "revoked" in ask(kits)[1]["NORTH"]
    authority.hand_to_server(issued)
    assert ask(kits) == (["NORTH"], {})


def test_a_name_is_free_again_when_its_certificate_was_revoked_or_has_expired(kits, authority):
    enrol(kits, "sites/NORTH")
    enrol(kits, "sites/SOUTH")
    authority.revoke("NORTH", NOW)
    assert authority.sign(made_request("NORTH"), NOW).kind == "new key"
    assert authority.sign(made_request("SOUTH"), NOW + 366 * DAY).kind == "new key"


def test_a_renewal_keeps_the_key_and_lasts_longer(kits):
    first = enrol(kits, "sites/NORTH")
    later = NOW + 300 * DAY
    second = enrol(kits, "sites/NORTH", later, renew=True)
    assert (first.kind, second.kind) == ("first", "renewal")
    assert first.fingerprint == second.fingerprint
    assert second.not_after == later + 365 * DAY
    assert ask(kits, NOW + 400 * DAY) == (["NORTH"], {})
    Authority.open(kits / "authority").revoke("NORTH", later)
    assert [bool(one.revoked) for one in Authority.open(kits / "authority").record.read()] == [True, True]


def test_a_key_belongs_to_one_name_and_a_revoked_key_is_never_signed_again(kits, authority):
    key = ec.generate_private_key(ec.SECP384R1())
    authority.sign(made_request("NORTH", key), NOW)
    with pytest.raises(ConfigError, match="holds the key of NORTH"):
        authority.sign(made_request("SOUTH", key), NOW)
    authority.revoke("NORTH", NOW)
    with pytest.raises(ConfigError, match="was revoked and is never signed again"):
        authority.sign(made_request("NORTH", key), NOW, replace=True)
    ca_key = serialization.load_pem_private_key((kits / "authority" / "ca.key").read_bytes(), None)
    with pytest.raises(ConfigError, match="authority's own key"):
        authority.sign(made_request("SOUTH", ca_key), NOW)


def test_the_record_outlives_the_process_and_a_damaged_one_stops_the_authority(kits, authority):
    issued = authority.sign(made_request("NORTH"), NOW)
    path = kits / "authority" / "issued.jsonl"
    assert mode(path) == 0o600
    (row,) = Authority.open(kits / "authority").record.read()
    assert (row.name, row.key, row.not_after) == ("NORTH", issued.fingerprint, issued.not_after)
    whole = path.read_text()
    for text, said in ((whole[:-20], "cut off"), ("{}\n" + whole, "line 1 is damaged"), ("[]\n", "line 1 is damaged")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            authority.sign(made_request("SOUTH"), NOW)
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        authority.sign(made_request("SOUTH"), NOW)


def test_two_requests_for_one_name_at_once_give_one_certificate(kits, monkeypatch):
    authority, outcomes = Authority.open(kits / "authority"), []
    read = Record.read

    def slowly(record):
        found = read(record)
        time.sleep(0.02)
        return found

    monkeypatch.setattr(Record, "read", slowly)

    def sign():
        try:
            outcomes.append(authority.sign(made_request("NORTH"), NOW).kind)
        except ConfigError:
            outcomes.append("refused")

    threads = [threading.Thread(target=sign) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["first"] + 5 * ["refused"]


def test_a_certificate_does_not_outlive_the_authority_nor_begin_after_it(authority):
    issued = authority.sign(made_request("NORTH"), NOW + 3600 * DAY)
    assert issued.not_after == authority.ca.not_valid_after_utc
    with pytest.raises(ConfigError, match="authority itself expired"):
        authority.sign(made_request("SOUTH"), NOW + 3651 * DAY)


def test_a_site_whose_name_leads_out_of_the_folder_is_refused_also_when_it_is_added_later(kits):
    path = kits / "authority" / "consortium.yaml"
    path.write_text(path.read_text().replace("- SOUTH", "- ../SOUTH"))
    with pytest.raises(ConfigError, match="no name for a file"):
        Authority.open(kits / "authority")


def test_an_authority_with_anothers_key_does_not_sign(kits, tmp_path):
    provision(CONSORTIUM, tmp_path / "others")
    shutil.copy(tmp_path / "others" / "authority" / "ca.key", kits / "authority" / "ca.key")
    with pytest.raises(ConfigError, match="does not belong to"):
        Authority.open(kits / "authority").sign(made_request("NORTH"), NOW)


# ---- whom the server lets in


def test_each_refused_certificate_has_its_own_sentence(kits, tmp_path):
    for kit in ("server", "sites/NORTH", "sites/SOUTH"):
        enrol(kits, kit)
    sites = kits / "server" / "sites"
    assert ask(kits) == (["NORTH", "SOUTH"], {})
    provision(CONSORTIUM, tmp_path / "foreign")
    enrol(tmp_path / "foreign", "sites/NORTH")
    foreign = (tmp_path / "foreign" / "sites" / "NORTH" / "site.crt").read_bytes()
    good = (sites / "NORTH.crt").read_bytes()
    cases = {
        "not signed by the authority": foreign,
        "for a server": (kits / "server" / "server.crt").read_bytes(),
        "belongs to SOUTH": (sites / "SOUTH.crt").read_bytes(),
        "damaged": good[:100],
        "far too long": good * 200,
        "purpose that is unknown": (kits / "server" / "ca.crt").read_bytes(),
    }
    for said, data in cases.items():
        (sites / "NORTH.crt").write_bytes(data)
        there, refused = ask(kits)
        assert there == ["SOUTH"]
        assert said in refused["NORTH"]
    (sites / "NORTH.crt").write_bytes(good)
    Authority.open(kits / "authority").revoke("SOUTH", NOW)
    Authority.open(kits / "authority").hand_to_server()
    there, refused = ask(kits)
    assert there == ["NORTH"]
    assert "was revoked on" in refused["SOUTH"]
    assert "valid only from" in ask(kits, NOW - DAY)[1]["NORTH"]


def test_of_two_certificates_with_one_key_only_one_is_let_in(kits, authority):
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    ca_key = serialization.load_pem_private_key((kits / "authority" / "ca.key").read_bytes(), None)
    for name in ("NORTH", "SOUTH"):  # as only a careless authority would sign them
        made = certificate_for(subject_of(name, "breast-2025"), key, (ca_key, authority.ca), (), NOW, NOW + DAY)
        (kits / "server" / "sites" / f"{name}.crt").write_bytes(pem(made))
    there, refused = ask(kits)
    assert there == ["NORTH"]
    assert "same key as NORTH" in refused["SOUTH"]


def test_an_expired_certificate_is_refused_while_the_list_is_fresh(kits):
    enrol(kits, "sites/NORTH")
    Authority.open(kits / "authority").revoke("", NOW + 364 * DAY)
    Authority.open(kits / "authority").hand_to_server()
    assert ask(kits, NOW + 364 * DAY) == (["NORTH"], {})
    there, refused = ask(kits, NOW + 365 * DAY)
    assert there == []
    assert "expired on" in refused["NORTH"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path, _: path.unlink(), "cannot be read"),
        (lambda path, _: path.write_bytes(b""), "damaged"),
        (lambda path, _: path.write_bytes(path.read_bytes()[:-60]), "damaged"),
        (lambda path, other: shutil.copy(other / "revoked.crl", path), "not signed by the authority"),
    ],
)
def test_without_a_good_list_of_the_revoked_nobody_enters(kits, tmp_path, spoil, said):
    enrol(kits, "sites/NORTH")
    provision(CONSORTIUM, tmp_path / "foreign")
    spoil(kits / "server" / "revoked.crl", tmp_path / "foreign" / "authority")
    there, refused = ask(kits)
    assert there == []
    assert said in refused["NORTH"]
    assert "fedssl revoke AUTHORITY" in refused["NORTH"]


def test_a_list_from_which_a_site_was_taken_out_by_hand_is_refused(kits):
    enrol(kits, "sites/NORTH")
    authority = Authority.open(kits / "authority")
    authority.revoke("NORTH", NOW)
    listed = x509.load_pem_x509_crl((kits / "authority" / "revoked.crl").read_bytes())
    der = bytearray(listed.public_bytes(serialization.Encoding.DER))
    serial = authority.record.read()[0].serial
    at = der.index(serial.to_bytes((serial.bit_length() + 7) // 8, "big"))
    der[at + 3] ^= 1
    (kits / "server" / "revoked.crl").write_bytes(pem(x509.load_der_x509_crl(bytes(der))))
    assert "was changed" in ask(kits)[1]["NORTH"]


def test_an_outdated_list_is_refused_until_it_is_renewed(kits):
    enrol(kits, "sites/NORTH")
    enrol(kits, "sites/NORTH", NOW + 300 * DAY, renew=True)
    late = NOW + 300 * DAY + 364 * DAY
    assert ask(kits, late) == (["NORTH"], {})
    authority = Authority.open(kits / "authority")
    authority.revoke("", NOW)
    authority.hand_to_server()
    there, refused = ask(kits, late)
    assert there == []
    assert "outdated" in refused["NORTH"]


def test_a_bit_flipped_anywhere_in_a_certificate_is_never_admitted(kits):
    enrol(kits, "sites/NORTH")
    path = kits / "server" / "sites" / "NORTH.crt"
    der = x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(serialization.Encoding.DER)
    for at in range(0, len(der), 7):
        spoilt = bytearray(der)
        spoilt[at] ^= 1 << at % 8
        body = ssl.DER_cert_to_PEM_cert(bytes(spoilt))
        path.write_text(body)
        there, refused = ask(kits)
        assert (there, list(refused)) == ([], ["NORTH"])


def test_a_registered_site_gives_the_same_key_as_text_and_as_bytes():
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    assert Registered("NORTH", line, NOW).public_key_bytes == public_key_bytes(key)
    assert len(fingerprint(key).split()) == 16


# ---- the verbs


def run(*words, code=0):
    done = CliRunner().invoke(COMMAND, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


def test_the_way_of_a_consortium_from_first_to_last_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("name: trial\nhost: localhost\nport: 9000\nsites: [NORTH, SOUTH]\nplan: []\n")
    run("provision", "c.yaml")
    kits = tmp_path / "kits"
    for kit, role in ((kits / "server", "server"), (kits / "sites" / "NORTH", "site")):
        asked = run("request", kit)
        name = "NORTH" if role == "site" else "server"
        looked = run("sign", kits / "authority", kit / f"{role}.csr", "--show")
        assert not Path(f"{name}.crt").exists()
        signed = run("sign", kits / "authority", kit / f"{role}.csr")
        shown = Identity.of(kit).key().public_key()
        assert fingerprint(shown) in asked
        assert fingerprint(shown) in signed
        assert fingerprint(shown) in looked
        assert ("SERVER's certificate" in signed) == (role == "server")
        run("install", kit, f"{name}.crt")
    assert ask(kits, datetime.now(UTC)) == (["NORTH"], {})
    assert "SOUTH has no certificate" in run("certificates", kits / "authority")
    run("request", kits / "sites" / "NORTH", "--renew")
    assert "renewal" in run("sign", kits / "authority", kits / "sites" / "NORTH" / "site.csr", "--out", "new.crt")
    run("install", kits / "sites" / "NORTH", "new.crt")
    assert "2 certificates revoked" in run("revoke", kits / "authority", "NORTH")
    assert "was revoked" in ask(kits, datetime.now(UTC))[1]["NORTH"]
    assert "EAST has no certificate" in run("revoke", kits / "authority", "EAST", code=2)
    assert "revoked" in run("sign", kits / "authority", kits / "sites" / "NORTH" / "site.csr", code=2)
    assert "not empty" in run("provision", "c.yaml", code=2)


def test_certificates_warns_a_month_before_an_end_and_prints_json(kits):
    enrol(kits, "server")
    enrol(kits, "sites/NORTH")
    enrol(kits, "sites/SOUTH", NOW + 30 * DAY)
    authority = Authority.open(kits / "authority")
    assert overview(authority, NOW + 334 * DAY)["warnings"] == []
    soon = " ".join(overview(authority, NOW + 336 * DAY)["warnings"])
    assert "server ends in 29 days" in soon
    assert "NORTH ends in 29 days" in soon
    assert "SOUTH" not in soon
    late = " ".join(overview(authority, NOW + 3651 * DAY)["warnings"])
    assert "NORTH expired" in late
    assert "The authority expired" in late
    assert "revoked.crl is outdated" in late
    done = CliRunner().invoke(COMMAND, ["certificates", str(kits / "authority"), "--format", "json"])
    found = json.loads(done.stdout)
    assert [row["name"] for row in found["certificates"]] == ["server", "NORTH", "SOUTH"]
    assert found["certificates"][0]["revoked"] is None


def test_an_authority_that_was_moved_away_from_the_server_says_what_to_copy(kits, tmp_path):
    shutil.move(kits / "authority", tmp_path / "safe")
    request(kits / "sites" / "NORTH")
    told = run("sign", tmp_path / "safe", kits / "sites" / "NORTH" / "site.csr", "--out", tmp_path / "n.crt")
    assert "sites/NORTH.crt" in told
    assert "only then does it take effect" in run("revoke", tmp_path / "safe", "NORTH")
