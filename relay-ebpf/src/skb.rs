//! Packets in traffic control, whose programs share this way to reach them.

use core::{hint, ptr};

use aya_ebpf::{
    Global,
    bindings::BPF_F_RECOMPUTE_CSUM,
    helpers::{bpf_csum_update, bpf_skb_load_bytes, bpf_skb_vlan_pop, bpf_skb_vlan_push},
    programs::TcContext,
};
use relay_common::{
    capture::{SNAP_MAX, SNAP_MIN},
    checksum::{ClassChange, PartialChecksum, Sum, UdpChange},
    packet::{Header, Packet},
    reason::Reason,
    wire::{Be16, Tag},
};

/// 0 where packets have no Ethernet header, but begin with that of IP: on tun and PPP.
#[unsafe(no_mangle)]
static ETHERNET: Global<u8> = Global::new(1);

/// A header between `data` and `end`, addresses of the first byte of a packet and behind its last.
///
/// # Errors
/// [`Reason::Truncated`] when the packet ends before the header does.
#[inline(always)]
pub fn header_at<'a, H: Header>(data: usize, end: usize, at: usize) -> Result<&'a mut H, Reason> {
    let start = data + at;
    if start + size_of::<H>() > end {
        return Err(Reason::Truncated);
    }
    // SAFETY: the bounds were checked just above, which is also the proof that the verifier wants.
    // Any bytes are a valid `H`.
    Ok(unsafe { &mut *(start as *mut H) })
}

/// How much of a packet of some length is copied, `most` at most. None where that is nothing to be had in
/// a stream.
#[inline(always)]
pub fn snapped(length: usize, most: u32) -> Option<u32> {
    let length = length.min(most as usize);
    if length > SNAP_MAX {
        return None;
    }
    // The compiler would make one comparison of both, of a difference that tells the verifier nothing.
    let length = hint::black_box(length);
    (length >= SNAP_MIN).then_some(length as u32)
}

/// A socket buffer, as traffic control has it.
pub struct Skb<'a>(pub &'a TcContext);

impl Skb<'_> {
    /// Whether a packet that leaves has come in on the same interface, as what the relay redirects
    /// has: the kernel notes where each comes in (`skb_iif`). What the host itself sends came in
    /// nowhere.
    #[inline(always)]
    pub fn came_in_here(&self) -> bool {
        let skb = self.0.skb.skb;
        // SAFETY: the context is the kernel's, valid while the program runs.
        unsafe { (*skb).ingress_ifindex == (*skb).ifindex }
    }
}

impl Packet for Skb<'_> {
    #[inline(always)]
    fn length(&self) -> usize {
        self.0.len() as usize
    }

    #[inline(always)]
    fn has_ethernet(&self) -> bool {
        ETHERNET.load() != 0
    }

    /// The kernel takes the outermost tag off before the ingress (`skb_vlan_untag()`), and puts it on
    /// behind the egress.
    #[inline(always)]
    fn tag_beside(&self) -> Option<Tag> {
        let skb = self.0.skb.skb;
        // SAFETY: as above.
        unsafe {
            ((*skb).vlan_present != 0).then(|| Tag {
                // The only one of these fields in network byte order.
                tpid: u16::from_be((*skb).vlan_proto as u16),
                control: (*skb).vlan_tci as u16,
            })
        }
    }

    #[inline(always)]
    fn is_aggregate(&self) -> bool {
        let skb = self.0.skb.skb;
        // SAFETY: as above.
        unsafe { (*skb).gso_size != 0 || (*skb).gso_segs > 1 }
    }

    #[inline(always)]
    fn segments(&self) -> u32 {
        // SAFETY: as above.
        let segments = unsafe { (*self.0.skb.skb).gso_segs };
        segments.max(1)
    }

    #[inline(always)]
    fn header<H: Header>(&mut self, at: usize) -> Result<&mut H, Reason> {
        header_at(self.0.data(), self.0.data_end(), at)
    }

    /// Without a pull, which would copy the headers of every packet that TCP may send again.
    #[inline(always)]
    fn read<H: Header>(&mut self, at: usize) -> Result<H, Reason> {
        if let Ok(header) = self.header::<H>(at) {
            return Ok(*header);
        }
        let mut header = H::new_zeroed();
        let to = ptr::from_mut(&mut header).cast();
        // SAFETY: the helper writes `size_of::<H>()` bytes, of which any are a valid `H`, or fails.
        match unsafe {
            bpf_skb_load_bytes(self.0.skb.skb.cast(), at as u32, to, size_of::<H>() as u32)
        } {
            0 => Ok(header),
            _ => Err(Reason::Truncated),
        }
    }

    /// By helpers, which copy a shared header before they write, and keep a sum over the packet right.
    #[inline(always)]
    fn change_traffic_class(&mut self, change: &ClassChange) -> Result<(), Reason> {
        const CHECKSUM: usize = 10;
        let new = Be16::new(change.new);
        // Checksum and class make up for each other in a sum over the packet; IPv6 has no checksum.
        let recompute = if change.has_checksum {
            let raw = |word: u16| u64::from(word.to_be());
            let at = change.ip + CHECKSUM;
            let changed = self
                .0
                .l3_csum_replace(at, raw(change.old), raw(change.new), 2);
            changed.map_err(|_| Reason::Truncated)?;
            0
        } else {
            u64::from(BPF_F_RECOMPUTE_CSUM)
        };
        // It cannot fail where the checksum, which stands behind it, was written.
        self.0
            .store(change.ip, &new, recompute)
            .map_err(|_| Reason::Truncated)
    }

    #[inline(always)]
    fn pull(&mut self, length: usize) {
        // Failing is harmless: what is not there is `truncated`.
        let _ = self.0.pull_data(length as u32);
    }

    #[inline(always)]
    fn partial_checksum(&self) -> PartialChecksum {
        PartialChecksum::Kept
    }

    /// The kernel knows whether this checksum is finished, left to the NIC, or verified by it:
    /// bpf_l4_csum_replace() keeps the field and that knowledge in step.
    #[inline(always)]
    fn change_udp_checksum(&mut self, change: &UdpChange) -> Result<Option<u16>, Reason> {
        const PSEUDO_HEADER: u64 = 1 << 4;
        const MANGLED_0: u64 = 1 << 5;
        const CHECKSUM: usize = 6;
        let at = change.udp + CHECKSUM;
        // A size of 0 says that `to` is a difference; it counts in network byte order.
        let addresses = u64::from(change.addresses.fold().to_be());
        let datagram = u64::from(change.datagram.fold().to_be());
        self.0
            .l4_csum_replace(at, 0, addresses, PSEUDO_HEADER | MANGLED_0)
            .and_then(|()| self.0.l4_csum_replace(at, 0, datagram, MANGLED_0))
            .map(|()| None)
            .map_err(|_| Reason::UdpChecksum)
    }

    /// Fails only for want of memory to move headers in, which are this program's own already: a
    /// program that writes to packets begins with a copy of what is shared.
    #[inline(always)]
    fn replace_tags(&mut self, [outer, inner]: [Tag; 2], depth: usize) -> Result<(), Reason> {
        let skb = self.0.skb.skb;
        // SAFETY: as above.
        let push = |tag: Tag| unsafe { bpf_skb_vlan_push(skb, tag.tpid.to_be(), tag.control) };
        // SAFETY: as above.
        let pop = || unsafe { bpf_skb_vlan_pop(skb) };
        // Taking one off brings the next to its place.
        let done = if depth >= 2 {
            pop() == 0 && pop() == 0 && push(inner) == 0 && push(outer) == 0
        } else {
            pop() == 0 && push(outer) == 0
        };
        if done {
            Ok(())
        } else {
            Err(Reason::RetagFailed)
        }
    }

    #[inline(always)]
    fn copy(&self, to: &mut [u8; SNAP_MAX], most: u32) -> u32 {
        let Some(length) = snapped(self.length(), most) else {
            return 0;
        };
        // SAFETY: the helper writes `length` bytes, or fails.
        match unsafe {
            bpf_skb_load_bytes(self.0.skb.skb.cast(), 0, to.as_mut_ptr().cast(), length)
        } {
            0 => length,
            _ => 0,
        }
    }

    #[inline(always)]
    fn prioritize(&mut self, priority: u32) {
        // SAFETY: as above.
        unsafe { (*self.0.skb.skb).priority = priority }
    }

    /// The NIC's sum over the packet (`CHECKSUM_COMPLETE`), where there is one. For
    /// bpf_l4_csum_replace() a new pseudo-header changes it too: right on IPv4, whose header makes
    /// up for the addresses, and on IPv6 undone here. (BPF_F_IPV6 would do, from Linux 6.16.)
    #[inline(always)]
    fn sum_changed(&mut self, change: Sum) {
        let change = u32::from(change.fold().to_be());
        // SAFETY: the context is the kernel's, valid while the program runs. An error says that
        // there is no such sum.
        unsafe { bpf_csum_update(self.0.skb.skb, change) };
    }
}
