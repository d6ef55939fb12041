"""Which addresses of the network are open to everybody: the only ones that are fetched from."""

from __future__ import annotations

import ipaddress

# Addresses of IPv6 that carry one of IPv4, which a translator or a relay on the way would reach.
_CARRIERS = tuple(
    map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0/96", "::/96"))
)


def is_public(text: str) -> bool:
    """Whether an address is one of the public internet.

    Private, loopback, link-local, shared (RFC 6598), multicast, reserved and unspecified addresses
    are not, nor is one of IPv6 that carries such an address of IPv4.

    Args:
      text: the address; what is none is not public.
    """
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    carried = [address]
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id:
            return False
        if any(address in network for network in _CARRIERS):
            return is_public(str(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)))
        carried += [found for found in (address.sixtofour, *(address.teredo or ())) if found]
    return all(one.is_global and not one.is_multicast and not one.is_reserved for one in carried)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
