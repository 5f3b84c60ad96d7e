//! The OVF descriptor of a machine that leaves: OVF 1 (DSP0243 1.1), in words that VirtualBox and VMware both know.
//!
//! Every disk has a file, also an empty one: VirtualBox takes the disks of an OVA from its members and leaves others
//! out. They are on a SATA controller, and the network card is an E1000: neither hypervisor has virtio disks.

use collective_model::Firmware;
use quick_xml::escape::escape;

use crate::export::Export;

/// A disk's file beside the descriptor.
pub(crate) struct DiskMember {
    /// Its name.
    pub file: String,
    /// Its length in bytes.
    pub length: u64,
    /// The disk's size in bytes.
    pub capacity: u64,
    /// The SHA256 of the file.
    pub sum: [u8; 32],
}

const VMDK: &str = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized";
/// The instance ID of the SATA controller, and of the first disk.
const CONTROLLER: usize = 3;
const FIRST_DISK: usize = 5;

/// The descriptor's text; `members` are the files of the machine's disks, in their order.
pub(crate) fn envelope(machine: &Export, members: &[DiskMember]) -> String {
    let (name, cpus, memory) = (&machine.name, machine.hardware.cpus, machine.hardware.memory.0 >> 20);
    let mut files = String::new();
    let mut disks = String::new();
    let mut items = String::new();
    for (index, (disk, member)) in machine.disks.iter().zip(members).enumerate() {
        let (number, file, length, capacity) = (index + 1, &member.file, member.length, member.capacity);
        let role = format!("{:?}", disk.role).to_lowercase();
        files += &format!("    <File ovf:href=\"{file}\" ovf:id=\"file{number}\" ovf:size=\"{length}\"/>\n");
        disks += &format!(
            "    <Disk ovf:capacity=\"{capacity}\" ovf:diskId=\"vmdisk{number}\" ovf:fileRef=\"file{number}\" \
             ovf:format=\"{VMDK}\" vbox:uuid=\"{}\"/>\n",
            uuid(member, index)
        );
        items += &format!(
            "      <Item>
        <rasd:AddressOnParent>{index}</rasd:AddressOnParent>
        <rasd:Caption>{}</rasd:Caption>
        <rasd:Description>{role} disk</rasd:Description>
        <rasd:ElementName>{}</rasd:ElementName>
        <rasd:HostResource>ovf:/disk/vmdisk{number}</rasd:HostResource>
        <rasd:InstanceID>{}</rasd:InstanceID>
        <rasd:Parent>{CONTROLLER}</rasd:Parent>
        <rasd:ResourceType>17</rasd:ResourceType>
      </Item>\n",
            disk.name,
            disk.name,
            FIRST_DISK + index
        );
    }
    let firmware = match machine.hardware.firmware {
        Firmware::Bios => "bios",
        Firmware::Uefi => "efi",
    };
    let summary = text(&machine.summary);
    let annotation = if summary.is_empty() {
        String::new()
    } else {
        format!(
            "    <AnnotationSection>
      <Info>What it is</Info>
      <Annotation>{summary}</Annotation>
    </AnnotationSection>\n"
        )
    };
    let virtualbox = match machine.hardware.firmware {
        Firmware::Bios => String::new(),
        Firmware::Uefi => virtualbox(machine, members),
    };
    // 101 is a Linux of 64 bits: nothing tells what the guest is, and this one's clock is UTC, as ours.
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>
<Envelope ovf:version=\"1.0\" xml:lang=\"en-US\" xmlns=\"http://schemas.dmtf.org/ovf/envelope/1\" \
         xmlns:ovf=\"http://schemas.dmtf.org/ovf/envelope/1\" \
         xmlns:rasd=\"http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData\" \
         xmlns:vssd=\"http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData\" \
         xmlns:vmw=\"http://www.vmware.com/schema/ovf\" xmlns:vbox=\"http://www.virtualbox.org/ovf/machine\">
  <References>
{files}  </References>
  <DiskSection>
    <Info>The disks</Info>
{disks}  </DiskSection>
  <NetworkSection>
    <Info>The networks</Info>
    <Network ovf:name=\"NAT\">
      <Description>A network with DHCP</Description>
    </Network>
  </NetworkSection>
  <VirtualSystem ovf:id=\"{name}\">
    <Info>One machine</Info>
    <Name>{name}</Name>
{annotation}    <OperatingSystemSection ovf:id=\"101\" vmw:osType=\"otherLinux64Guest\">
      <Info>The guest</Info>
      <Description>Linux_64</Description>
    </OperatingSystemSection>
    <VirtualHardwareSection>
      <Info>The hardware</Info>
      <System>
        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>
        <vssd:InstanceID>0</vssd:InstanceID>
        <vssd:VirtualSystemIdentifier>{name}</vssd:VirtualSystemIdentifier>
        <vssd:VirtualSystemType>vmx-10</vssd:VirtualSystemType>
      </System>
      <Item>
        <rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits>
        <rasd:Caption>{cpus} CPUs</rasd:Caption>
        <rasd:ElementName>{cpus} CPUs</rasd:ElementName>
        <rasd:InstanceID>1</rasd:InstanceID>
        <rasd:ResourceType>3</rasd:ResourceType>
        <rasd:VirtualQuantity>{cpus}</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits>
        <rasd:Caption>{memory} MiB of memory</rasd:Caption>
        <rasd:ElementName>{memory} MiB of memory</rasd:ElementName>
        <rasd:InstanceID>2</rasd:InstanceID>
        <rasd:ResourceType>4</rasd:ResourceType>
        <rasd:VirtualQuantity>{memory}</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:Address>0</rasd:Address>
        <rasd:Caption>sataController0</rasd:Caption>
        <rasd:Description>SATA Controller</rasd:Description>
        <rasd:ElementName>sataController0</rasd:ElementName>
        <rasd:InstanceID>{CONTROLLER}</rasd:InstanceID>
        <rasd:ResourceSubType>AHCI</rasd:ResourceSubType>
        <rasd:ResourceType>20</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:AutomaticAllocation>true</rasd:AutomaticAllocation>
        <rasd:Caption>Ethernet adapter on NAT</rasd:Caption>
        <rasd:Connection>NAT</rasd:Connection>
        <rasd:ElementName>Ethernet adapter on NAT</rasd:ElementName>
        <rasd:InstanceID>4</rasd:InstanceID>
        <rasd:ResourceSubType>E1000</rasd:ResourceSubType>
        <rasd:ResourceType>10</rasd:ResourceType>
      </Item>
{items}      <vmw:Config ovf:required=\"false\" vmw:key=\"firmware\" vmw:value=\"{firmware}\"/>
    </VirtualHardwareSection>
{virtualbox}  </VirtualSystem>
</Envelope>
"
    )
}

/// The machine in VirtualBox's own words, of which it reads UEFI and no other: then it takes all of the machine from
/// here, and knows the disks by their UUIDs.
fn virtualbox(machine: &Export, members: &[DiskMember]) -> String {
    let (name, cpus, memory) = (&machine.name, machine.hardware.cpus, machine.hardware.memory.0 >> 20);
    // Never a disk's: those have other indexes.
    let own = members.first().map(|member| uuid(member, usize::from(u8::MAX))).unwrap_or_default();
    let ports = members.len();
    let mut disks = String::new();
    for (index, member) in members.iter().enumerate() {
        let uuid = uuid(member, index);
        disks += &format!(
            "            <AttachedDevice type=\"HardDisk\" port=\"{index}\" device=\"0\"><Image uuid=\"{{{uuid}}}\"/>\
             </AttachedDevice>\n"
        );
    }
    format!(
        "    <vbox:Machine ovf:required=\"false\" version=\"1.19-linux\" uuid=\"{{{own}}}\" name=\"{name}\" OSType=\"Linux_64\">
      <ovf:Info>The machine for VirtualBox</ovf:Info>
      <Hardware>
        <CPU count=\"{cpus}\"><PAE enabled=\"true\"/><LongMode enabled=\"true\"/></CPU>
        <Memory RAMSize=\"{memory}\"/>
        <Firmware type=\"EFI\"/>
        <BIOS><IOAPIC enabled=\"true\"/></BIOS>
        <RTC localOrUTC=\"UTC\"/>
        <Network>
          <Adapter slot=\"0\" enabled=\"true\" type=\"82540EM\"><NAT/></Adapter>
        </Network>
        <StorageControllers>
          <StorageController name=\"SATA\" type=\"AHCI\" PortCount=\"{ports}\" useHostIOCache=\"false\" Bootable=\"true\">
{disks}          </StorageController>
        </StorageControllers>
      </Hardware>
    </vbox:Machine>
"
    )
}

/// The file's own UUID (version 8: of our making), so that nothing is drawn by lot.
fn uuid(member: &DiskMember, index: usize) -> String {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&member.sum[..16]);
    bytes[6] = 0x80 | bytes[6] & 0x0f;
    bytes[8] = 0x80 | bytes[8] & 0x3f;
    bytes[15] = index as u8;
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    [&text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..]].join("-")
}

/// As XML can have it: most control characters are not even possible there escaped.
fn text(text: &str) -> String {
    let possible = |char: &char| !char.is_control() && !matches!(char, '\u{fffe}' | '\u{ffff}');
    escape(
        text.trim()
            .chars()
            .map(|char| if char.is_whitespace() { ' ' } else { char })
            .filter(possible)
            .collect::<String>(),
    )
    .into_owned()
}
