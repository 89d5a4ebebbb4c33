"""Certificates say who a process is, and only their own cluster's authority made them."""

from __future__ import annotations

import datetime

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from dsgd_cli.contract import names
from dsgd_cli.launcher.identity import make_authority, new_cluster_id


def certificate(pem: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.encode())


def test_a_certificate_names_its_process_and_is_signed_by_its_cluster() -> None:
    ours, theirs = make_authority(new_cluster_id()), make_authority(new_cluster_id())
    issued = certificate(ours.issue("worker/3")["cert"])
    name = issued.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert name.get_values_for_type(x509.DNSName) == [f"worker-3.{ours.cluster_id}.dsgd"]
    assert names.parse_dns_name(f"worker-3.{ours.cluster_id}.dsgd") == ("worker/3", ours.cluster_id)
    issued.verify_directly_issued_by(certificate(ours.certificate))
    with pytest.raises((ValueError, InvalidSignature)):
        issued.verify_directly_issued_by(certificate(theirs.certificate))


def test_a_daemons_certificate_cannot_sign_others() -> None:
    issued = certificate(make_authority(new_cluster_id()).issue("server/0")["cert"])
    constraints = issued.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca


def test_a_host_whose_clock_is_a_day_behind_accepts_it() -> None:
    issued = certificate(make_authority(new_cluster_id()).issue("server/0")["cert"])
    now = datetime.datetime.now(datetime.timezone.utc)
    assert issued.not_valid_before_utc < now - datetime.timedelta(hours=24)
    assert issued.not_valid_after_utc > now + datetime.timedelta(days=20)


@pytest.mark.parametrize("bad", ["laptop/0", "worker", "worker/-1", "worker/01", "worker/3.evil"])
def test_nothing_but_a_process_gets_a_certificate(bad: str) -> None:
    with pytest.raises(ValueError, match="not a process name"):
        make_authority(new_cluster_id()).issue(bad)
